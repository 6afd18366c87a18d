"""The same codes in another layout: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.errors import UsageError, suggestion
from qtool.models import open_artifact
from qtool.pipeline.card import origin
from qtool.pipeline.content import refuse_changed
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.prepare import flags
from qtool.pipeline.publish import publish
from qtool.pipeline.stopwatch import Stopwatch
from qtool.pipeline.upload import check_repository, upload
from qtool.recipe.export import options_of, owners
from qtool.report.model import ArtifactEntry
from qtool.store.files import check_free, new_folder
from qtool.store.names import output_path


@dataclass(frozen=True)
class ExportOptions:
    """What `qtool export` was asked to do.

    Attributes:
        source: a quantized artifact: folder, file or hub id.
        to: name of the layout to write.
        out: folder of the result.
        overwrite: replace an earlier result.
        verify: read the result back.
        options: of the layout, by name; None as a value: not given.
        push_to: hub repository to upload to.
        private: create it so that nobody else sees it.
        revision: its branch that gets the upload; None: the main one.
        base_model: what the model card says instead of what the source's own card does.
        license: the same.
    """

    source: str
    to: str
    out: Path
    overwrite: bool = False
    verify: bool = True
    options: Mapping[str, object] = field(default_factory=dict)
    push_to: str | None = None
    private: bool = False
    revision: str | None = None
    base_model: str | None = None
    license: str | None = None


def run(options: ExportOptions, listener: Listener = silent) -> ArtifactEntry:
    """Reads one artifact and writes another.

    Raises:
        UsageError: no such layout, or an option that it does not have.
        PlanError: the layout cannot hold these codes, with every reason.
        CheckpointError, StorageError, VerifyError, HubError: see there.
    """
    layouts = registry.names("artifact")
    if options.to not in layouts:
        raise UsageError(f"--to: no layout is called {options.to!r}", hint=suggestion(options.to, layouts))
    check_repository(options.push_to, options.private, options.revision)
    out = output_path(options.out, options.source)
    check_free(out, options.overwrite)
    chosen = {key: value for key, value in options.options.items() if value is not None}
    if strange := [key for key in chosen if key not in options_of(options.to).model_fields]:
        wanted = " or ".join(f"--to {name}" for key in strange for name in owners(key))
        raise UsageError(flags(strange), wanted=wanted, found=f"--to {options.to}")
    artifact: Artifact = registry.load("artifact", options.to)(**chosen)
    model = open_artifact(options.source)
    refuse_changed(model.source, listener)
    artifact.check(model)
    for caveat in artifact.caveats(model, model.layers):
        listener(Event("export", 0, 1, f"{options.to}: {caveat}", warning=True))
    source = origin(model, options.base_model, options.license)
    card = {"base_model": source.base_model, **source.license, "repository": options.push_to or ""}
    with new_folder(out, options.overwrite) as folder:
        (entry,) = publish({options.to: artifact}, model, folder, card, options.verify, Stopwatch(), listener)
    if options.push_to:
        upload(out, options.push_to, listener, private=options.private, revision=options.revision)
    return entry
