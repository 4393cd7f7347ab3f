"""Bottleneck: what bounds the speed of a step, from the time of its phases."""

PHASES = ("data_wait", "transform", "forward", "backward", "optimizer", "save", "other")
STALLED = 0.1  # share of the time above which a phase that computes nothing is the bottleneck


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """The share of each phase in the total."""
    total = sum(seconds.values())
    return {phase: value / total for phase, value in seconds.items()}


def bottleneck(seconds: dict[str, float]) -> str:
    """What bounds the speed of the steps that took `seconds`, and which setting to change, in one line."""
    share = shares(seconds)
    if share["save"] > max(STALLED, share["data_wait"]):
        return (
            f"save-bound: {share['save']:.0%} of the time goes into checkpoints inside of epochs; "
            "raise SAVE_STEPS or write to a faster disk (OUTPUT)"
        )
    if share["data_wait"] > STALLED:
        return (
            f"input-bound: {share['data_wait']:.0%} of the time waits for images; raise DATA.NUM_WORKERS while "
            "cores are free, then pack the images (tools/pack.py) or lighten AUG.AUTO_AUGMENT"
        )
    computing = share["forward"] + share["backward"] + share["optimizer"]
    return (
        f"compute-bound: {computing:.0%} of the time is forward, backward and optimizer; if they are slow, "
        "AMP_DTYPE auto, MODEL.GRAD_CHECKPOINTING False and the largest DATA.BATCH_SIZE that fits are fastest"
    )
