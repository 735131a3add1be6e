"""Metrics of a service, as Prometheus gets them."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """What one GET brought."""

    families: dict[str, Metric]

    def value(self, sample: str, **labels: str) -> float:
        """The value of a sample with exactly these labels."""
        [found] = [
            one.value
            for family in self.families.values()
            for one in family.samples
            if (one.name, one.labels) == (sample, labels)
        ]
        return found

    def labels(self, sample: str, label: str) -> set[str]:
        """The values of a label."""
        return {
            one.labels[label]
            for family in self.families.values()
            for one in family.samples
            if one.name == sample
        }

    def names(self) -> set[str]:
        """The names of samples, histograms' without their suffixes."""
        return {
            family.name if family.type == "histogram" else one.name
            for family in self.families.values()
            for one in family.samples
        }


def scrape(address: str) -> Scrape:
    """GET the metrics at "host:port"."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as response:
        text = response.read().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a metric came twice"
    return Scrape({family.name: family for family in families})
