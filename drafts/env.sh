cd /tmp/p/w10; export PYTHONPATH=/tmp/p/w10 PATH=/work/main/.venv/bin:$PATH OMP_NUM_THREADS=1 LABKIT_NO_INSTALL=1
