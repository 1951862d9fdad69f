"""Named objects behind one contract (`base`): a local directory (`file`), S3 (`s3`), and the async side (`client`)."""
