"""What goes wrong between policy and engine."""


class WeightSyncError(RuntimeError):
    """An engine does not hold the policy's weights; names the tensor where it is known which. The run cannot go on."""
