"""Parameter-efficient finetuning methods: one file a method, named by `_target_` in conf/method/*.yaml."""
