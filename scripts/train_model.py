"""Train one model from scratch."""

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.training.train import train_language, train_vision

    train = train_language if snakemake.wildcards.experiment == "language" else train_vision
    train(
        *snakemake.input.text,
        snakemake.params.settings,
        snakemake.params.variant,
        seed=int(snakemake.wildcards.seed),
        model_out=snakemake.output.model,
        history_out=snakemake.output.history,
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
