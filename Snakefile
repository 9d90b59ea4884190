from snakemake.utils import min_version

from cospadi.runs import kind_of, plan_run

min_version("9.27")


configfile: "config.yaml"


# the config of the whole: this file's own, or of a Snakefile that has this one as a module and may pass a part of it
outer = workflow.modifier_stack[0].globals["config"]
# a run compresses a model or trains models from scratch; from here on each kind goes its own way
kind = kind_of(config)
plan = plan_run(
    config,
    overrides=workflow.config_settings.overwrite_config if config is outer else {},
    source=", ".join(map(str, workflow.configfiles)),
    files=workflow.configfiles,
)
plan.place = workflow.modifier.modify_path  # a module may have a prefix
outer = plan.config if workflow.modifier.is_main_snakefile() else outer
config = plan.config


report: f"workflow/report/{kind.name}.rst"


# Whether other runs may take models, text and Grams from a cache (`--cache`). Snakemake keeps those of rules without a
# benchmark alone: what was taken was not measured.
caching = workflow.enable_cache and not getattr(plan, "is_local", False)


pathvars:
    results=plan.results,
    logs=f"{plan.results}/logs",
    benchmarks=f"{plan.results}/benchmarks",


include: f"workflow/{kind.name}.smk"


for cached in filter(lambda one: one.cache and one.cache.output, workflow.rules):
    cached._benchmark = None


rule all:
    default_target: True
    input:
        getattr(rules, kind.name).input,
    localrule: True
    message:
        f"Everything is in {plan.place(plan.results)}"


# Snakemake looks a second later whether more jobs may start, after every look again, and every job that ends begins a
# row of looks that never ends (JobScheduler._schedule_reevalutation): after 150 jobs of many inputs that took a seventh of
# a core. Without a limit on how many start a second there are none; one that was asked for stays.
onstart:
    limit = workflow.scheduler.job_rate_limiter
    if limit is not None and (limit.max_jobs, limit.timespan) == (100, 1):  # Snakemake's own
        workflow.scheduler.job_rate_limiter = None


onsuccess:
    if message := plan.closing_message():
        print(message)
