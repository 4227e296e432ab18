"""Expert models that write personas and cold-start answers: endpoints, a cache of their answers, costs."""
