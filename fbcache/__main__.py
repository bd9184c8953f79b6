"""``python -m fbcache``: the command line."""

from fbcache.cli import main

if __name__ == "__main__":
    main()
