"""A tensor's bytes on disk -> one meaning. Everything after this package knows only these two classes."""

from exl.formats.matrix import DenseMatrix, QuantizedMatrix

__all__ = ["DenseMatrix", "QuantizedMatrix"]
