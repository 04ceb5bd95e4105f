"""From text to batches: corpora, tokenizer, the index on disk, streaming, and the order of samples."""

from sltrain_dist.data.entry import Data, open_data, prepare_data

__all__ = ["Data", "open_data", "prepare_data"]
