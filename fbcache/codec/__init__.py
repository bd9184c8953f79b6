"""Values to frames and back.

- :mod:`frames`: what every codec makes and takes
- :mod:`msgpack_codec`: the codec; :mod:`encoder` and :mod:`decoder` walk, :mod:`tags` is their vocabulary
- :mod:`scalars`, :mod:`arrays` (with :mod:`dtypes` and :mod:`memory`), :mod:`pickling`: the families of types
- :mod:`compressed`: a codec around another (with :mod:`compression` and :mod:`planes`)
- :mod:`registry`: types that users add; :mod:`registered`: how they are taken apart; :mod:`anatomy`: what
  they hold; :mod:`entry_points`: those that other packages bring; :mod:`families`: those of other libraries
- :mod:`layout`: frames as one file
"""

from typing import Final

from fbcache.codec.compressed import Compressed, Expanding
from fbcache.codec.frames import Buffer, Codec, Frames, Reads
from fbcache.codec.msgpack_codec import MsgpackCodec
from fbcache.codec.registry import register

#: Codecs whose frames every pool can read, by name.
BUILT_IN: Final[dict[str, Reads]] = {codec.name: codec for codec in (MsgpackCodec(), Expanding())}

__all__ = ["BUILT_IN", "Buffer", "Codec", "Compressed", "Frames", "MsgpackCodec", "register"]
