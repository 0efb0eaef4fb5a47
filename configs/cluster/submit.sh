#!/bin/sh
# To a Ray cluster that runs already: sh configs/cluster/submit.sh
# RAY_API_SERVER_ADDRESS names its dashboard, ~/.ray/auth_token holds its token; the cluster's image holds this package.
RAY_AUTH_MODE=token ray job submit --working-dir configs -- raybilevel run digits.yaml --address auto --storage s3://my-bucket/runs/one --out runs/one
