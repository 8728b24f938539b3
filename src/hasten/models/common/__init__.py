"""What architectures share: reading fields, rope frequencies, the parts of a decoder."""

from hasten.models.common.decoder import Block, Decoder
from hasten.models.common.fields import Fields, Shape, read_shape
from hasten.models.common.rope import Rotation, read_rope

__all__ = ["Block", "Decoder", "Fields", "Rotation", "Shape", "read_rope", "read_shape"]
