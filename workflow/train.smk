# A run that trains models from scratch: a tokenizer, one model a variant and seed, a table of them.
include: "rules/text.smk"
include: "rules/train.smk"


# what the report is of
reported = rules.summarize_training.output


include: "rules/report.smk"


rule train:
    input:
        plan.trained(rules.train_model.output.model),
        rules.report.output,
    localrule: True
    message:
        f"The models are in {plan.place(plan.results)}/training"
