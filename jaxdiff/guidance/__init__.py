"""Guidance: maps from denoisers to denoisers, one paper a file."""

from jaxdiff.guidance._classifier_free import ClassifierFree as ClassifierFree
