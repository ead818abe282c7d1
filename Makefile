# `make demo` trains a detector and shows its results; `make test` runs all checks. Both create .venv first.
PYTHON ?= python3
DATA = --dataset shapes --shapes_val 120
RUN = runs/demo

.PHONY: demo test lint

demo: .venv/installed
	.venv/bin/python train.py $(DATA) --shapes_train 320 --depth 18 --weights none --recipe scratch --epochs 4 \
		--batch_size 4 --min_side 96 --lr 7e-4 --val_every 4 --out_dir $(RUN)
	.venv/bin/python visualize.py $(DATA) --model $(RUN)/best.pt --out_dir $(RUN)
	@echo
	@echo "Scores on images that the detector was not trained on:"
	@.venv/bin/python validate.py $(DATA) --model $(RUN)/best.pt
	@echo "Detections beside the ground truth: $(RUN)/detections.png; training curves: $(RUN)/curves.png"
	@echo "To train on your own data:"
	@echo "  .venv/bin/python train.py --dataset csv --csv_train train.csv --csv_val val.csv --csv_classes classes.csv"

test: .venv/installed-for-tests lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal

lint: .venv/installed-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e ".[plots]"
	touch $@

.venv/installed-for-tests: .venv/installed
	.venv/bin/python -m pip install -q -e ".[dev,jpeg,onnx,plots,tensorboard,video,yolo]"
	touch $@
