"""For SGLang on a host without CUDA: what its configurations of image models import of torchvision.

The torchvision of the package index is built for CUDA; beside a CPU build of torch it cannot be imported, and while it
is installed neither can transformers' models. So it is not installed, and language models need none of it.
"""
