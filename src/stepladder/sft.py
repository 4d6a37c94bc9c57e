"""scripts/sft.py as a module: accelerate launch --config_file FILE --num_processes 2 -m stepladder.sft --recipe lora"""

from stepladder import installation

if __name__ == "__main__":
    installation.run_script("sft")
