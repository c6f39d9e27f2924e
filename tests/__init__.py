"""Tests; shared oracles and strategies are modules beside them."""
