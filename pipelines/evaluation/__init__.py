"""Score answers to public benchmarks by the rules of VLMEvalKit, without a judge model and without evaluating data."""
