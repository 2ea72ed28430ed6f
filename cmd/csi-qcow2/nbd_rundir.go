package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

// servingName is the file in a run directory that says which image is being
// served. It is removed when the image was closed, so one that is found names an
// image whose server was killed.
const servingName = "serving"

// An nbdRunDir is what a server keeps across its own death: the metadata cache,
// and the name of its image. A nil one keeps nothing.
type nbdRunDir struct {
	path   string
	tables *arena
	left   bool // a server that was killed has left something here
}

// openNBDRunDir prepares dir for serving the image file name, and sets in o what
// the image needs to be taken over from a killed server.
func openNBDRunDir(dir, name string, o *imagefile.Options) (*nbdRunDir, error) {
	name, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	tables, err := openArena(context.Background(), 0, dir, qcow2.DefaultCacheBytes)
	if err != nil {
		return nil, fmt.Errorf("run directory %q: %w", dir, err)
	}
	r := &nbdRunDir{path: dir, tables: tables}
	// The arena's lock is ours now: nobody else writes here.
	previous, err := os.ReadFile(r.serving())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = os.WriteFile(r.serving(), []byte(name), 0o600)
	case err == nil && string(previous) != name:
		err = fmt.Errorf("run directory %q: the server of %q was killed; serve that image once more, or remove the directory and lose what was not flushed", dir, previous)
	}
	if err != nil {
		return nil, errors.Join(err, tables.close())
	}
	sum := sha256.Sum256([]byte(name))
	o.Cache, o.ID, o.Unclean = tables.Cache, [16]byte(sum[:16]), previous != nil
	r.left = previous != nil
	return r, nil
}

func (r *nbdRunDir) serving() string { return filepath.Join(r.path, servingName) }

// unopened ends the use of the directory for an image that could not be opened: of that nothing is kept
// but what a killed server has left.
func (r *nbdRunDir) unopened() error {
	return r.close(r == nil || !r.left)
}

// close ends the use of the directory. clean says that the image was closed.
func (r *nbdRunDir) close(clean bool) error {
	if r == nil {
		return nil
	}
	var err error
	if clean {
		err = os.Remove(r.serving())
	}
	return errors.Join(err, r.tables.close())
}
