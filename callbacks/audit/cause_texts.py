"""Causes of a wrong gradient, each with the remedy."""

RANDOM = (
    "random numbers are drawn in training_step even in evaluation mode: a dropout that is always on "
    "(F.dropout without training=self.training), noise, sampling; the gradient is not repeatable, so "
    "the divisor cannot be checked"
)
NOT_DETERMINISTIC = (
    "not repeatable with the same random numbers: an operation that is not deterministic, or state "
    "outside of the module; the divisor cannot be checked"
)
ROW_ORDER = (
    "the order of the rows matters: a row's loss depends on its position in the micro-batch (labels "
    "shifted over the batch dimension, noise with a seed of its own)"
)
PADDING = (
    "padding enters the loss: a row's gradient depends on its padding (a mean or a normalization over "
    "padding, attention to it); mask it"
)
BATCH_STATISTICS = (
    "statistics of the micro-batch: {layers} normalize over the rows of the micro-batch; use a "
    "normalization of each row (LayerNorm), or keep these layers in evaluation mode"
)
ROWS_INTERACT = (
    "rows of a micro-batch depend on each other: in-batch negatives, advantages centered over the "
    "batch, or a number that is computed over the micro-batch, such as a mean of weights; each "
    "partitioning has another loss: compute such a number from one row or from the whole step, and "
    "keep the rows of in-batch negatives together"
)
UNSCORED = (
    "unscored tokens in the denominator: the divisor counts prompt or padding tokens; count only "
    "scored tokens"
)
LONGEST_ROW = (
    "divided by the longest row: the divisor depends on which rows are together; divide by a count "
    "of the whole optimizer step, or by a constant"
)
DIVIDED_TWICE = (
    "divided twice: training_step divides by the number of micro-batches, and Lightning does so "
    "again; leave it to Lightning"
)
NEVER_DIVIDED = (
    "never divided: the loss grows with the number of micro-batches; divide by a count of the whole "
    "optimizer step"
)
UNDIVIDED_SUM = (
    "undivided sum: a sum over tokens that is not divided by a count, and of which Lightning takes "
    "the mean over micro-batches; divide by a count of the whole optimizer step"
)
LAST_ONLY = "only the last micro-batch of a step enters the gradient"
MEAN_OF_MEANS = (
    "mean of micro-batch means: each micro-batch is divided by its own count, so tokens in short "
    "ones have a larger weight; divide the sum of the whole optimizer step by its count"
)
OWN_COUNT = (
    "each process divides by its own count: tokens of a process with few have a larger weight; sum "
    "the count over processes"
)
DRIFT = (
    "each process divides the averaged gradient by its own count: their weights drift apart; sum the "
    "count over processes"
)
WORLD_SIZE_MISSING = (
    "1/world_size: the count is summed over processes, but the strategy takes the mean of the "
    "gradients; multiply by the number of processes"
)
WORLD_SIZE_TOO_MUCH = (
    "multiplied by world_size: the strategy takes the mean of the gradients, and the divisor is not "
    "summed over processes"
)
STALE_COUNT = (
    "stale count: the gradient is divided by a count of earlier samples; divide by the count of the "
    "samples themselves"
)
DIVIDED_BY_COUNT_TWICE = (
    "divided by the count twice: the gradient of repeated samples is half as large; divide once (in "
    "training_step, on_before_optimizer_step or configure_gradient_clipping)"
)
