"""The Ray pipeline around Ovis2: the only package that knows Ray and Arrow."""

__version__ = "0.1.0"
