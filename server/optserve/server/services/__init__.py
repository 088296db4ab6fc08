"""The RPCs: decode, one call, encode."""
