"""A process's numbers as Prometheus' text. Its client is imported here alone, and only once somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lazyfs.stats import Buckets

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

Values = Mapping[Any, float] | Mapping[Any, Buckets]  # keys: tuples of the labels' values


@dataclass(frozen=True, slots=True)
class Metric:
    """What is promised of a metric, as docs/metrics.md lists it. Counters end in _total; times are seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()


Reading = tuple[Metric, Values]  # a metric and its values by those of its labels


def one(metric: Metric, value: float) -> Reading:
    """Return the reading of a metric without labels."""
    return metric, {(): value}


def render(readings: Iterable[Reading]) -> bytes:
    """Return the text. Blocking: the first call imports Prometheus' client, 70 ms."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)  # our own: nothing that the client adds by itself
    registry.register(_Collector(list(readings)))
    return generate_latest(registry)


class _Collector:
    def __init__(self, readings: list[Reading]) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Family]:
        for metric, values in self._readings:
            yield _family(metric, values)


def _family(metric: Metric, values: Mapping[tuple[str, ...], Any]) -> Family:
    from prometheus_client import core

    if metric.kind == "histogram":
        histogram = core.HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for labels, (buckets, total) in sorted(values.items()):
            histogram.add_metric(labels, buckets, total)
        return histogram
    family: core.CounterMetricFamily | core.GaugeMetricFamily
    if metric.kind == "counter":
        family = core.CounterMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    else:
        family = core.GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family
