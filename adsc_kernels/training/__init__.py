"""Instruction tuning under a schedule: transformers' `Trainer`, PEFT's LoRA, `apply_adsc`.

`run.train` is where it starts; `config.TrainConfig` lists what can be set. The extra `train` brings
what is needed besides (accelerate, peft, PyYAML).
"""
