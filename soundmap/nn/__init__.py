"""The network: tensors in, tensors out. No files, no tokenisers, no printing."""
