"""The files of adapters: what PEFT and other trainers write, without params."""
