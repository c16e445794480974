"""COMPACT: multi-teacher chain-of-thought distillation for small students.

.. include:: ../docs/quickstart.md
.. include:: ../docs/data-format.md
.. include:: ../docs/method.md
.. include:: ../docs/metrics.md
.. include:: ../docs/distributed.md
"""
