#!/bin/sh
# To a Ray cluster that already runs: sh configs/cluster/submit.sh
#
# RAY_API_SERVER_ADDRESS names its dashboard, and ~/.ray/auth_token holds a copy of its token. The machine that submits
# needs ray[default] of the cluster's version. The nodes need Linux, the same Python (3.11 or newer), ray[default] and
# this package, all with the versions of constraints.txt. Config and summary are kept in the storage as well. If a job
# was lost, the same line with --resume at its end continues it.
# If nodes are added on demand: --set search.max_concurrent=8.
RAY_AUTH_MODE=token ray job submit --working-dir configs -- raybilevel run digits.yaml --address auto --storage s3://my-bucket/runs/one --out runs/one --set search.max_failures=3
