package volume

import (
	"errors"
	"io/fs"
	"path"

	"golang.org/x/sys/unix"
)

// A Space says what the volumes of a pool are promised and what they take.
type Space struct {
	Provisioned int64 // virtual sizes of the volumes that users see, together, bytes
	Snapshots   int   // that users see
	Volumes     []VolumeSpace
	Tombstones  int // deleted volumes that something still needs
}

// A VolumeSpace is the space of one volume.
type VolumeSpace struct {
	Volume
	Allocated int64 // of its image in the host file system, bytes, snapshots included
}

// Space asks the host file system for every image of the pool.
func (p *Pool) Space() (Space, error) {
	var s Space
	p.mu.Lock()
	for _, e := range p.volumes {
		switch {
		case e.rec == nil: // damaged: nothing is known of it
		case e.rec.Deleted:
			s.Tombstones++
		default:
			s.Provisioned += e.rec.Size
			s.Volumes = append(s.Volumes, VolumeSpace{Volume: e.rec.volume()})
		}
		for _, snap := range e.snapshots {
			if snap.live() {
				s.Snapshots++
			}
		}
	}
	p.mu.Unlock()
	for i := range s.Volumes {
		n, err := p.allocated(s.Volumes[i].ID)
		if err != nil {
			return Space{}, err
		}
		s.Volumes[i].Allocated = n
	}
	return s, nil
}

// allocated returns what the image of the volume id takes, 0 when it was
// deleted meanwhile.
func (p *Pool) allocated(id string) (int64, error) {
	const unit = 512 // of st_blocks, whatever the file system's blocks are
	var st unix.Stat_t
	name := path.Join(volumeDir(id), diskName)
	// The ID is of the index, so name has no user's string in it.
	err := unix.Fstatat(p.dir.Fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return 0, nil
	case err != nil:
		return 0, &fs.PathError{Op: "stat", Path: path.Join(p.path, name), Err: err}
	}
	return st.Blocks * unit, nil
}
