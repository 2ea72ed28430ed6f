package qcow2

import "context"

// CheckFile verifies the image in f, which nothing else may change meanwhile,
// and repairs it as o says. Unlike Open it takes images whose dirty or corrupt
// bit is set. The caller keeps f; repairs are durable when it returns.
func CheckFile(ctx context.Context, f File, o CheckOptions) (CheckResult, error) {
	h, err := readHeader(f)
	if err != nil {
		return CheckResult{}, err
	}
	return checkFile(ctx, f, h, o)
}
