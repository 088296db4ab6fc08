"""What both sides of the wire share: the chunk codec, dtypes, the flat layout, values and the error tree."""
