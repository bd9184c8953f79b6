"""Codecs for the values of other libraries, a module or more for each.

:mod:`~fbcache.codec.families.kinds` is what they are written against, and the table of libraries; nothing
here is imported before its library is.
"""
