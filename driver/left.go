package driver

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"csi-qcow2/internal/durable"
)

// leftRecords returns the records that a predecessor has left in the directory dir of
// the run directory, each under the ID of its volume. It removes damaged ones: the
// kernel is the truth. Of those of another boot nothing is left: it removes them, too.
func leftRecords[T any, R interface {
	*T
	origin() (volume, bootID string)
}](ctx context.Context, run *durable.Dir, dir, kind string, version int) (left []T, err error) {
	if err := firstOf(run.Mkdir(dir), run.RemoveTemporary(dir)); err != nil {
		return nil, err
	}
	names, err := run.List(dir)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		name = dir + "/" + name
		var record T
		err := durable.ReadRecord(run, name, kind, version, &record)
		id, origin := R(&record).origin()
		switch {
		case errors.Is(err, durable.ErrDamaged), err == nil && name != dir+"/"+id+".json":
			klog.FromContext(ctx).Error(err, "removing a damaged record", "record", name)
			err = run.Remove(name)
		case err == nil && origin != boot:
			err = run.Remove(name)
		case err == nil:
			left = append(left, record)
		}
		if err != nil {
			return left, fmt.Errorf("record %q: %w", name, err)
		}
	}
	return left, nil
}
