"""The jobs over HTTP, for the panel. Who may ask is decided by access.py.

A client names jobs by their ids and nothing by a path.
"""

from __future__ import annotations

import re

from ...trainers.job.folder import JobError
from ..names import with_current_names
from . import access
from .access import Jobs
from .handlers import Answer, changing, reading
from .of_comfyui import every_job, registry
from .own_files import image
from .registry import UnknownJob

REQUESTS = ("pause", "continue", "stop", "stop_now", "sample")
ACTIONS = (*REQUESTS, "resume", "delete")

# --- answers -------------------------------------------------------------------------------------


def act(jobs: Jobs, id: str, action: str) -> Answer:
    """Carry out an action on a job.

    Args:
        jobs: where it is.
        action: one of `ACTIONS`.

    Returns:
        {"job": summary, "at": when}, or {"error": sentence}.
    """
    if action not in ACTIONS:
        return 404, {"error": f"there is no action {action[:40]!r}; there is {', '.join(ACTIONS)}"}
    try:
        before = jobs.summary(id)
        if action == "delete":
            jobs.delete(id)
            return 200, {"job": before | {"state": "deleted"}, "at": every_job().stamp()}
        if action == "resume":
            jobs.resume(id)
        else:
            jobs.ask(id, action)  # pyright: ignore[reportArgumentType] (one of REQUESTS)
        return 200, jobs.answer(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}
    except (JobError, OSError) as error:
        return 409, {"error": str(error)}


def look(jobs: Jobs, id: str) -> Answer:
    """A job in detail."""
    try:
        return 200, jobs.job(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}


def sample(jobs: Jobs, id: str, iteration: str, index: str) -> bytes | Answer:
    """A sampled image, or why there is none."""
    if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in (iteration, index)):
        return 404, {"error": "an image is named by two whole numbers: iteration and index"}
    try:
        folder = jobs.folder(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}
    found = image(folder.root, folder.samples / f"{int(iteration):05}" / f"{int(index):03}.png")
    missing = f"the job {id} has no image {index} of iteration {iteration}"
    return (404, {"error": missing}) if found is None else found


# --- ComfyUI -------------------------------------------------------------------------------------


def register() -> None:
    """Add the routes to ComfyUI's server, and look after the jobs that an earlier one left."""
    server = access.server()
    if server is None:
        return
    access.watch(server)
    server.add_on_prompt_handler(with_current_names)
    routes = server.routes
    routes.get("/pcpo/jobs")(reading(lambda _: (200, registry().answer())))
    routes.get("/pcpo/jobs/{id}")(reading(lambda at: look(registry(), at["id"])))
    routes.get("/pcpo/jobs/{id}/samples/{iteration}/{index}")(
        reading(lambda at: sample(registry(), at["id"], at["iteration"], at["index"]))
    )
    routes.route("*", "/pcpo/jobs/{id}/{action}")(
        changing(lambda at, _: act(registry(), at["id"], at["action"]), "a job")
    )
    every_job().wake()
