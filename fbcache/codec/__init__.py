"""Values to frames and back.

- :mod:`frames`: what every codec makes and takes
- :mod:`msgpack_codec`: the codec; :mod:`encoder` and :mod:`decoder` walk, :mod:`tags` is their vocabulary
- :mod:`scalars`, :mod:`arrays` (with :mod:`dtypes` and :mod:`memory`), :mod:`pickling`: the families of types
- :mod:`registry`: types that users add; :mod:`families`: those of other libraries
- :mod:`layout`: frames as one file
"""

from fbcache.codec.frames import Buffer, Codec, Frames
from fbcache.codec.msgpack_codec import MsgpackCodec
from fbcache.codec.registry import register

__all__ = ["Buffer", "Codec", "Frames", "MsgpackCodec", "register"]
