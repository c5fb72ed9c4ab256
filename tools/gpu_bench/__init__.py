"""GPU benchmark: layers and whole steps inside CUDA graphs, in resumable parts (see __main__)."""
