"""What to say of layers that delivered nothing, so that the cause is found."""

from collections.abc import Sequence

from loghook.capture.layers import Layer


def nothing_delivered(layers: Sequence[Layer]) -> str:
    """Say why a block without a single row may have none."""
    if not any(layer.fired for layer in layers):
        return (
            "no watched layer ran in this block, or its hooks never fired. Run the model's forward and backward inside "
            "the block, with gradients enabled (no torch.no_grad, torch.inference_mode, merged or disabled adapter); "
            "if the model was compiled before watch(), call watch() first."
        )
    return (
        "no backward pass reached a watched layer in this block: call loss.backward() inside it, without inputs= (and "
        "not torch.autograd.grad), on a loss that depends on the model's output. Where a framework calls it, as "
        "Lightning does after training_step, docs/trainer.md says how."
    )


def partly_delivered(missing: Sequence[Layer], quiet: bool, total: int) -> str:
    """Say why some of ``total`` layers may have no rows; ``quiet``: all of them ran without gradients."""
    names = ", ".join(repr(layer.name) for layer in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if quiet:
        cause = (
            "it ran without gradients: under torch.no_grad or torch.inference_mode, or in a reentrant checkpoint whose "
            "input needs no gradient (use loghook.frozen, or use_reentrant=False)"
        )
    elif not any(layer.fired for layer in missing):
        cause = (
            "its forward never ran here: a branch not taken, an adapter that is merged or disabled, a module that was "
            "put in its place, a model compiled before watch(), or a fused kernel that reads the weight without "
            "calling the module (fused losses do that to lm_head)"
        )
    elif all(layer.fired for layer in missing):
        cause = (
            "it ran, but no gradient came back: the loss does not depend on it, its output was detached, or a "
            "reentrant checkpoint got an input that needs no gradient (use loghook.frozen, or use_reentrant=False)"
        )
    else:
        cause = "some never ran, some got no gradient"
    return (
        f"{len(missing)} of {total} watched layers delivered no rows in this block: {names}. Likely cause: {cause}. "
        "Nothing of this batch was written. Exclude such layers, or name them in watch(..., may_sleep=...) if they may "
        "rightly stay silent."
    )
