"""The tests behind `taskvec.diagnose`: what is wrong with a merge, told from its tensors."""
