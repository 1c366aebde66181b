"""`megatron-dapo doctor`: what a run needs of its machine, checked before it starts."""
