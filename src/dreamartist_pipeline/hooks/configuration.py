"""Check the configuration and the inputs before a run."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Pipeline
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dreamartist_pipeline.core.choosing import scored_steps
from dreamartist_pipeline.early_checks import EarlyCheck, PlannedConcept, early_checks_of
from dreamartist_pipeline.errors import InputError, input_error_in
from dreamartist_pipeline.hooks.run import path_of, settings_of, with_paths_in
from dreamartist_pipeline.params import RUN_SETTINGS, SECTIONS

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_MAX_SHOWN = 300  # characters of a value in a message
_SURROGATE = re.compile("[\ud800-\udfff]")
_SUBJECT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_IN_ASCII = str.maketrans(  # letters that Unicode does not decompose to ASCII, and German umlauts
    "đðħıĸłŋŧøабвгдезийклмнопрстуфыэіαβγδεζηικλμνοπρσςτυφω", "ddhiklntoabvgdeziyklmnoprstufyeiabgdeziiklmnoprsstyfo"
) | str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "æ": "ae", "œ": "oe", "þ": "th", "'": "", "\u2019": ""}
    | {"ё": "yo", "ж": "zh", "х": "kh", "ц": "ts", "ч": "ch", "ш": "sh", "щ": "shch", "ъ": "", "ь": "", "ю": "yu"}
    | {"я": "ya", "є": "ye", "ї": "yi", "ґ": "g", "θ": "th", "ξ": "x", "χ": "ch", "ψ": "ps"}
)


class ConfigurationHooks:
    """Refuse invalid configuration before anything is loaded or written."""

    def __init__(self) -> None:
        self._subject, self._env = "NAME", ""
        self._kept: Any = None  # a concept that must not be replaced by another one

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        """Register the project root for configuration files, then validate the parameters of all pipelines.

        Kedro takes a parameter's type from the annotation of the node that reads it, and silently passes a plain
        dictionary if another annotation of that node cannot be evaluated. The schema does not depend on nodes.

        Raises:
            InputError: an unknown key or method, an invalid subject, or values out of bounds, all of
                these in one error.
        """
        register_project_root(context.project_path)
        given = context.config_loader.runtime_params or {}
        check_names(given, origin="--params")
        check_image_has_subject(given)
        settings = settings_of(context)
        check_texts(settings)
        check_subject(settings["subject"], settings["image"])
        self._subject, self._env = str(settings["subject"]), context.env or ""
        parameters = load_parameters(context)
        if Path.cwd() != context.project_path:  # nodes and messages take them relative to the working directory
            parameters = with_paths_in(parameters, context.project_path, None)
        context.config_loader["parameters"] = build_parameters(parameters)

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens a run
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Fail before the run on missing files and invalid parameters.

        Raises:
            InputError: a missing input, a damaged concept, an import that would replace a concept, or a node's early
                check.
        """
        replaces_none = "params:import" in pipeline.inputs() and not catalog.load("params:import").replace
        self._kept = earlier_import(catalog) if replaces_none else None
        checks = dict.fromkeys(check for node in pipeline.nodes for check in early_checks_of(node.func))
        for check in checks:
            if check.section == "device":  # without the GPU of --env sd15, no file helps
                run_early_check(check, catalog, None)
        for name in sorted(pipeline.inputs()):
            if name != "parameters" and not name.startswith("params:") and not catalog.exists(name):
                refuse_missing(name, catalog, self._subject, self._env)
        planned = planned_concept(pipeline, catalog)
        for check in checks:
            if check.section != "device":
                run_early_check(check, catalog, planned)

    @hook_impl(tryfirst=True)  # before OutputHooks stores it aside
    def before_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Let an import that was killed after its concept was written write the same one again.

        Raises:
            InputError: it is another concept.
        """
        if dataset_name == "concept" and self._kept is not None and not data.is_stored_like(self._kept):
            files = ", ".join(name for name, _ in self._kept.metadata.imported_from or ())
            raise _replaces(f"another one, imported from {files}")


def refuse_missing(name: str, catalog: DataCatalog, subject: str, env: str) -> None:
    """Load a missing input, which raises the error of its dataset, or name the pipeline that makes it.

    Raises:
        InputError: always, for datasets that one node makes.
        DatasetError: the error of the dataset.
    """
    makers = {node.name for stage in pipelines.values() for node in stage.nodes if name in node.outputs}
    if len(makers) != 1:  # a user's file, or a concept, which is trained or imported
        catalog.load(name)
    stage = min((stage for stage in pipelines if name in pipelines[stage].all_outputs()), key=_num_nodes)
    needs_picture = "reference_image" in pipelines[stage].inputs() and not catalog.exists("reference_image")
    options = f"--env {env} " if env not in ("", "local") else ""
    params = f"subject={subject}" + (",image=PICTURE" if needs_picture else "")
    raise InputError(
        expected=f"{name}" if (path := path_of(catalog, name)) is None else f"{name} at {path}",
        got="no such file",
        remedy=f"make it first: kedro run --pipeline {stage} {options}--params {params}",
    )


def _num_nodes(stage: str) -> int:
    return len(pipelines[stage].nodes)


def planned_concept(pipeline: Pipeline, catalog: DataCatalog) -> PlannedConcept | None:
    """Return what is known of a run's concept before the run; None without one, or in an import.

    Raises:
        InputError: the metadata of the existing concept are damaged.
    """
    if any("concept" in node.outputs and "params:training" in node.inputs for node in pipeline.nodes):
        training = catalog.load("params:training")
        return PlannedConcept.of_training(training, scored_steps(training))
    if "concept" not in pipeline.inputs():
        return None
    dataset: Any = catalog["concept"]
    metadata = dataset.load_metadata()
    return PlannedConcept(False, metadata.zero_terminal_snr, metadata.lora, tuple(metadata.words))


def run_early_check(early: EarlyCheck, catalog: DataCatalog, planned: PlannedConcept | None) -> None:
    """Run a check on its section of the parameters.

    Raises:
        InputError: the error of the check, with the section's name as `where`.
    """
    try:
        inputs = [catalog.load(name) for name in early.inputs]
        early.check(catalog.load(f"params:{early.section}"), planned, *inputs)
    except InputError as error:
        raise InputError(error.expected, error.got, error.remedy, where=early.section) from error


def register_project_root(project_path: Path) -> None:
    """Register the resolver `${project_root:}`; the package may be installed outside the project."""
    OmegaConf.register_new_resolver("project_root", project_path.as_posix, replace=True)


def earlier_import(catalog: DataCatalog) -> Any:
    """Return the subject's concept if it was imported: the same import may go on; None without a concept.

    Raises:
        InputError: the subject has a concept that was trained, or one that is damaged.
    """
    if not catalog.exists("concept"):
        return None
    path = path_of(catalog, "concept")
    try:
        concept = catalog.load("concept")
    except DatasetError:
        raise _replaces(f"{path}, which is damaged") from None
    if concept.metadata.imported_from is None:
        raise _replaces(f"{path}")
    return concept


def _replaces(got: str) -> InputError:
    return InputError(
        expected="a subject without a concept, or with the one of the same import",
        got=got,
        remedy="choose another name (subject=NAME), or replace it (import.replace=true)",
    )


def check_names(names: Collection[str], origin: str) -> None:
    """Refuse top-level parameters that are neither a section nor a run setting.

    Raises:
        InputError: an unknown name; the remedy suggests the nearest known one.
    """
    known = (*RUN_SETTINGS, *SECTIONS)
    for name in map(str, names):
        if name not in known:
            raise InputError(
                expected=f"parameters out of {', '.join(known)}",
                got=f"'{name}' from {origin}",
                remedy=nearest(name, known, otherwise="remove it"),
            )


def build_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections as the models of params.py, without variables (names with a leading underscore).

    Raises:
        InputError: unknown keys and values out of bounds, of all sections in one error.
    """
    check_texts(parameters)
    parameters = {name: value for name, value in parameters.items() if not name.startswith("_")}
    check_names(parameters, origin="conf/")
    built, problems = dict(parameters), []
    for section in SECTIONS.keys() & parameters.keys():
        try:
            built[section] = SECTIONS[section].model_validate(parameters[section])
        except ValidationError as error:
            problems += [f"  {_problem(section, detail)}" for detail in _first_errors(error)]
    if problems:
        raise InputError(
            expected="valid parameters",
            got="\n".join(["others:", *sorted(problems)]),
            remedy="correct them in --params or in conf/; conf/base/parameters_*.yml lists them",
        )
    return built


def check_texts(values: object, where: str = "") -> None:
    """Check that all keys of nested values are texts, and all texts valid Unicode.

    Raises:
        InputError: a key such as 1 or null, or a lone surrogate, which stands for a byte that is not UTF-8.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            if not isinstance(name, str):
                raise InputError(
                    expected="names of parameters that are texts",
                    got=f"the key {name!r}" + (f" in {where}" if where else ""),
                    remedy="correct it in conf/; in YAML, a text such as null, true or 1 is written in quotes",
                )
            check_texts(name, f"the name {name!r}")
            check_texts(value, f"{where}.{name}" if where else name)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            check_texts(value, f"{where}.{index}")
    elif isinstance(values, str) and _SURROGATE.search(values):
        raise InputError(
            expected=f"valid Unicode as {where}",
            got=_short(values),
            remedy="type the text again; in a file, a file's name or a terminal, use UTF-8",
        )


def _short(value: object) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _first_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors without those inside the value of an unknown key."""
    unknown = {detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"}
    return [
        detail
        for detail in error.errors()
        if detail["type"] == "extra_forbidden" or not any(detail["loc"][: len(key)] == key for key in unknown)
    ]


def _problem(section: str, detail: ErrorDetails) -> str:
    where = ".".join([section, *(str(part)[:_MAX_SHOWN] for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        key, known = str(detail["loc"][-1]), _keys_beside(SECTIONS[section], detail["loc"])
        return f"{where}: unknown key; {nearest(key, known, otherwise='remove it')}"
    if isinstance(detail["input"], dict):
        return f"{where}: {detail['msg']}"
    problem = f"{where}: {detail['msg']}; got {_short(detail['input'])}"
    if isinstance(detail["input"], str) and detail["type"] in ("tuple_type", "list_type"):
        return f"{problem}; write a list, {as_list(detail['input'])}"
    if isinstance(detail["input"], str) and detail["type"] in ("model_type", "dict_type"):
        return f"{problem}; name one of its keys, {where}.KEY=VALUE"
    return problem


def as_list(text: str) -> str:
    """Return a text as a list in YAML: its parts between commas, in single quotes."""
    parts = [part.strip().strip("'\"") for part in text.strip("[] ").split(",")]
    return yaml_list([part for part in parts if part])


def yaml_list(texts: Sequence[str]) -> str:
    """Return texts as a list in YAML, in single quotes."""
    return "[" + ", ".join("'" + str(text).replace("'", "''") + "'" for text in texts) + "]"


def _keys_beside(model: Any, path: Sequence[int | str]) -> list[str]:
    """Return the keys allowed at the last part of `path`."""
    for part in path[:-1]:
        if isinstance(part, str):
            if part not in model.model_fields:  # the name of an extra network
                return []
            annotation = model.model_fields[part].annotation
            model = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)


def nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    """Return a remedy for an unknown name: the nearest known one, else `otherwise`."""
    spelt = name.lower().replace("+", "-plus").replace(" ", "-")  # as in "DreamArtist++"
    near = difflib.get_close_matches(spelt, known, n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def check_subject(subject: object, image: object = None) -> None:
    """Refuse a subject that cannot be a folder name and part of a trigger word.

    Args:
        subject: of the run.
        image: path of the picture, if any, whose name is suggested for a subject without Latin letters.

    Raises:
        InputError: characters other than letters, digits, '.', '-' and '_'.
    """
    if subject is None or not _SUBJECT.match(str(subject)):
        stem = "" if image is None else Path(str(image)).stem
        example = ascii_subject("" if subject is None else str(subject)) or ascii_subject(stem) or "cat"
        raise InputError(
            expected="a subject of Latin letters, digits, '.', '-' and '_' (it names folders and the trigger word)",
            got=f"'{subject}'",
            remedy=f"use for example '{example}'",
        )


def ascii_subject(text: str) -> str:
    """Return a valid subject that reads like a text: "Kätzchen" becomes "kaetzchen", "🦊" "fox-face".

    Umlauts are spelt out as in German; other accents are dropped. "" for a text without anything that reads like Latin.
    """
    for form in ("NFC", "NFKD"):  # letters of the table first, then the letters below other accents
        text = unicodedata.normalize(form, text.lower()).translate(_IN_ASCII)
    named = "".join(f" {unicodedata.name(c, '')} " if unicodedata.category(c) == "So" else c for c in text)
    unaccented = "".join(character for character in named.lower() if not unicodedata.combining(character))
    return re.sub(r"[^a-z0-9]+", "-", unaccented).strip("-")


def check_image_has_subject(given: Mapping[str, Any]) -> None:
    """Refuse `image` without `subject`, because the results would replace those of another subject.

    Raises:
        InputError: `image` without `subject`.
    """
    if "image" in given and "subject" not in given:
        raise InputError(
            expected="a subject for the image",
            got=f"image={given['image']} alone",
            remedy="add subject=NAME, which names folders and the trigger word",
        )


def load_parameters(context: KedroContext) -> dict[str, Any]:
    """Return the merged parameters.

    Raises:
        InputError: raised by a resolver, such as an unknown method; an invalid `${…}`; or an override of a single list
            entry.
    """
    try:
        return dict(context.config_loader["parameters"])
    except OmegaConfBaseException as error:
        if (cause := input_error_in(error)) is not None:
            raise cause from None
        raise InputError(
            expected="parameters whose ${…} refer to others",
            got=str(error).splitlines()[0],
            remedy="correct them in conf/ or in --params; a slot of a prompt is written without $, as in {pt1}",
        ) from error
    except TypeError as error:  # OmegaConf merges a mapping into a list
        raise InputError(
            expected="parameters of the same structure as in conf/",
            got=f"{context.config_loader.runtime_params} ({error})",
            remedy=(
                "replace the whole list, such as training.lora_unet=[{lr: 1e-4, rank: 4, branch: p, layers: "
                "['re:.*attn']}]"
            ),
        ) from error
