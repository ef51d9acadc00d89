# The tracking server: MLflow of constraints.txt with drivers for PostgreSQL and S3.
FROM python:3.11-slim
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt mlflow boto3 psycopg2-binary==2.9.13
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
