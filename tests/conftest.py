"""Hypothesis profiles: `dev` by default, `ci` where CI is set, `deep` for `make test-deep`."""

import os

from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=slow)
settings.register_profile("ci", settings.get_profile("ci"), deadline=None, max_examples=50, suppress_health_check=slow)
settings.register_profile("deep", deadline=None, max_examples=2000, suppress_health_check=slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
