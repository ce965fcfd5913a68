"""nightsplit site: the worker of a hospital."""

from nightsplit.console.options import IdleSeconds, LogFormat, Overrides, SiteFile


def site(
    file: SiteFile, overrides: Overrides = [], idle_seconds: IdleSeconds = None, log_format: LogFormat = "text"
) -> int:
    """Work for one hospital.

    Send the messages that the hospital's policy allows, and train on the answers. The site may be stopped at
    any time; start the same command again to continue.
    """
    from nightsplit.console.watch import Watch
    from nightsplit.site_worker.worker import SiteWorker

    watch = Watch(log_format)
    worker = SiteWorker(file, overrides, stop=watch.stop, observe=watch.observe)
    end = f"run {worker.run_config.run.id} is finished; the site's part of the model is in {worker.model_folder}"
    return watch.run(worker.config.name, worker, lambda: worker.work(idle_seconds), end)
