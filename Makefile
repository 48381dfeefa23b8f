# Everything a newcomer needs; `make help` lists it. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CAMVID := runs/camvid-cpu
STUDENTS := runs/camvid-students
RECIPE := configs/camvid_students
FOCUS := runs/camvid-focus
ONLINE := runs/camvid-online
ENTROPY := runs/high-entropy
REBALANCING := runs/camvid-rebalancing
COMPRESS := configs/camvid_compress
SEARCH := runs/search/camvid
CHECKED := models data losses engine evaluation deploy tests benchmarks notebooks *.py

.PHONY: help setup setup-dev demo demo-clean test test-slow lint format camvid camvid-students camvid-focus
.PHONY: camvid-online high-entropy camvid-rebalancing camvid-compress camvid-search benchmarks notebook clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/run.done  ## make the environment .venv with what the scripts need

setup-dev: $(VENV)/dev.done  ## the same with the tools for tests, checks and notebooks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): older than Python 3.11; name a newer one, say make PYTHON=python3.12 setup" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/dev.done: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --requirement requirements-dev.txt
	@touch $@ $(VENV)/run.done

demo: setup  ## teacher, baseline and distilled student on drawn street scenes: a table and a picture in minutes
	@if [ -f runs/demo/comparison.md ]; then echo "runs/demo: already there; 'make demo-clean demo' begins anew"; fi
	$(RUN) train_teacher.py configs/demo_teacher.yaml resume=true
	$(RUN) train_teacher.py configs/demo_baseline.yaml resume=true
	$(RUN) distill.py configs/demo_distill.yaml resume=true
	@if [ -f runs/demo/comparison.md ]; then cat runs/demo/comparison.md; else \
		$(RUN) profile_latency.py runs/demo/teacher runs/demo/baseline runs/demo/distilled backends=[eager,channels_last] && \
		$(RUN) evaluate.py runs/demo/teacher runs/demo/baseline runs/demo/distilled out=runs/demo/comparison; fi
	@echo "The picture: runs/demo/comparison.png"

demo-clean:  ## delete the demo's runs
	rm -rf runs/demo

test: setup-dev  ## the tests, in minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-slow: setup-dev  ## the long tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

lint: setup-dev  ## style, lint and types
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/mypy

format: setup-dev  ## put the code into style
	$(VENV)/bin/ruff format $(CHECKED)
	$(VENV)/bin/ruff check --fix $(CHECKED)

camvid: setup  ## the real CamVid experiment on a CPU (set CAMVID_ROOT); hours; call it again to go on
	$(RUN) train_teacher.py configs/camvid_cpu_teacher.yaml resume=true
	$(RUN) train_teacher.py configs/camvid_cpu_baseline.yaml resume=true
	$(RUN) distill.py configs/camvid_cpu_distill.yaml resume=true
	$(RUN) profile_latency.py $(CAMVID)/teacher $(CAMVID)/baseline $(CAMVID)/distilled
	$(RUN) evaluate.py $(CAMVID)/teacher $(CAMVID)/baseline $(CAMVID)/distilled split=test out=results/camvid-cpu

camvid-students: setup  ## students of several kinds on real CamVid, three seeds (set CAMVID_ROOT); hours
	$(RUN) train_teacher.py $(RECIPE)/recipe.yaml $(RECIPE)/teacher.yaml resume=true
	for seed in 0 1 2; do \
		for name in unet8 unet16 unet24 stride16 stride16_sliced dabnet; do \
			$(RUN) train_teacher.py $(RECIPE)/recipe.yaml $(RECIPE)/$$name.yaml \
				run_dir=$(STUDENTS)/$$name-$$seed seed=$$seed resume=true || exit; \
		done; \
		$(RUN) train_teacher.py $(RECIPE)/recipe.yaml $(RECIPE)/stride16.yaml train.steps=1800 \
			run_dir=$(STUDENTS)/stride16_short-$$seed seed=$$seed resume=true || exit; \
		$(RUN) distill.py $(RECIPE)/recipe.yaml $(RECIPE)/stride16_adapted.yaml \
			run_dir=$(STUDENTS)/stride16_adapted-$$seed seed=$$seed resume=true || exit; \
	done
	$(RUN) profile_latency.py $(STUDENTS)/teacher $(STUDENTS)/*-0 backends=[eager] threads=1 rounds=15
	$(RUN) evaluate.py $(STUDENTS)/teacher $(STUDENTS)/*-[0-9] split=test pictures=3 out=results/camvid-students

camvid-focus: setup  ## which part of a UNet to teach, on real CamVid (after camvid-students' teacher); an hour
	$(RUN) train_teacher.py $(RECIPE)/recipe.yaml $(RECIPE)/teacher.yaml resume=true
	for seed in 0 1; do \
		$(RUN) train_teacher.py $(RECIPE)/recipe.yaml configs/camvid_focus/alone.yaml \
			run_dir=$(FOCUS)/alone-$$seed seed=$$seed resume=true || exit; \
		for name in all logits encoder bottleneck decoder; do \
			$(RUN) distill.py $(RECIPE)/recipe.yaml configs/camvid_focus/student.yaml configs/camvid_focus/$$name.yaml \
				run_dir=$(FOCUS)/$$name-$$seed seed=$$seed resume=true || exit; \
		done; \
		$(RUN) distill.py $(RECIPE)/recipe.yaml configs/camvid_focus/student.yaml configs/camvid_focus/logits.yaml \
			teacher.source=live run_dir=$(FOCUS)/live-$$seed seed=$$seed resume=true || exit; \
	done
	$(RUN) evaluate.py $(FOCUS)/*-[0-9] split=test pictures=3 calibration_every=3 out=results/camvid-focus

camvid-online: setup  ## online against offline distillation on real CamVid, at equal time; half an hour
	for seed in 0 1; do \
		$(RUN) train_teacher.py $(RECIPE)/recipe.yaml configs/camvid_online/teacher.yaml \
			run_dir=$(ONLINE)/teacher-$$seed seed=$$seed resume=true || exit; \
		$(RUN) distill.py $(RECIPE)/recipe.yaml configs/camvid_online/offline.yaml $(ONLINE)/teacher-$$seed \
			run_dir=$(ONLINE)/offline-$$seed seed=$$seed resume=true || exit; \
		for name in simultaneous alternating; do \
			$(RUN) distill.py $(RECIPE)/recipe.yaml configs/camvid_online/$$name.yaml \
				run_dir=$(ONLINE)/$$name-$$seed seed=$$seed resume=true || exit; \
		done; \
	done
	$(RUN) evaluate.py $(ONLINE)/*-[0-9] $(ONLINE)/*-[0-9]/teacher split=test pictures=3 calibration_every=3 out=results/camvid-online

high-entropy: setup  ## four teachers, three of high entropy, and what each teaches, on real CamVid; an hour
	for name in teacher label_smoothing confidence_penalty margin; do \
		$(RUN) train_teacher.py $(RECIPE)/recipe.yaml configs/high_entropy/teacher.yaml \
			configs/high_entropy/$$name.yaml resume=true || exit; \
		for seed in 0 1; do \
			$(RUN) distill.py $(RECIPE)/recipe.yaml configs/high_entropy/student.yaml $(ENTROPY)/$$name \
				run_dir=$(ENTROPY)/student_of_$$name-$$seed seed=$$seed resume=true || exit; \
		done; \
	done
	$(RUN) evaluate.py $(ENTROPY)/teacher $(ENTROPY)/label_smoothing $(ENTROPY)/confidence_penalty \
		$(ENTROPY)/margin $(ENTROPY)/student_of_*-[0-9] split=test pictures=3 calibration_every=3 out=results/high-entropy

camvid-rebalancing: setup  ## weights, sampling and copy-paste for rare classes, on real CamVid, two seeds; half an hour
	for seed in 0 1; do \
		$(RUN) train_teacher.py $(RECIPE)/recipe.yaml configs/camvid_rebalancing/student.yaml \
			run_dir=$(REBALANCING)/none-$$seed seed=$$seed resume=true || exit; \
		for name in weights rare_class copy_paste both all; do \
			$(RUN) train_teacher.py $(RECIPE)/recipe.yaml configs/camvid_rebalancing/student.yaml \
				configs/camvid_rebalancing/$$name.yaml run_dir=$(REBALANCING)/$$name-$$seed seed=$$seed resume=true || exit; \
		done; \
	done
	$(RUN) evaluate.py $(REBALANCING)/*-[0-9] split=test pictures=3 calibration_every=3 out=results/camvid-rebalancing

camvid-compress: setup  ## prune, fine-tune with and without distillation, int8, on real CamVid (after camvid); half an hour
	$(RUN) compress.py $(COMPRESS)/recipe.yaml $(COMPRESS)/parent.yaml resume=true
	$(RUN) compress.py $(COMPRESS)/recipe.yaml $(COMPRESS)/labels.yaml resume=true
	$(RUN) compress.py $(COMPRESS)/recipe.yaml $(COMPRESS)/latency.yaml resume=true

camvid-search: setup  ## a search for a student as fast as the hand-made one, on real CamVid; half an hour
	$(RUN) search_student.py configs/search/camvid.yaml finalists=1 resume=true
	for path in $(SEARCH)/students/*.yaml; do \
		$(RUN) train_teacher.py $$path seed=1 run_dir=$(SEARCH)/seed1/$$(basename $$path .yaml) resume=true || exit; \
	done
	$(RUN) profile_latency.py $(SEARCH)/finalists/* backends=[eager] threads=1 rounds=30 passes=5
	$(RUN) evaluate.py $(SEARCH)/finalists/* $(SEARCH)/seed1/* split=test pictures=2 calibration_every=5 out=results/camvid-search

benchmarks: setup  ## time and memory of the parts that we wrote ourselves
	$(RUN) benchmarks/losses.py
	$(RUN) benchmarks/affinity.py
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/streets.py
	$(RUN) benchmarks/models.py
	$(RUN) benchmarks/cached_teacher.py
	$(RUN) benchmarks/cached_teacher.py precision=fp32 output=results/cached_teacher_fp32.md
	$(RUN) benchmarks/data.py
	$(RUN) benchmarks/postprocess.py

notebook: setup-dev  ## make the notebooks' .ipynb from their .py
	$(VENV)/bin/jupytext --to ipynb notebooks/*.py

clean:  ## delete the environment and all runs
	rm -rf $(VENV) runs
