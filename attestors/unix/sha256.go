package unix

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxSums is how many programs' hashes are remembered.
const maxSums = 1024

// settled is how long a file must have been left alone for its hash to be
// remembered: file systems count time in steps, and a change within one step
// would not be seen.
const settled = 2 * time.Second

// sums remembers the hashes of files. The zero value is ready.
type sums struct {
	mu    sync.Mutex
	known map[version]*list.Element // of *remembered
	order list.List                 // most recently used first
}

// version is one state of one file.
type version struct {
	dev, inode   uint64
	size         int64
	mtime, ctime unix.Timespec
}

type remembered struct {
	version
	sum string
}

func links(f *os.File) (uint64, error) {
	st, err := stat(f)
	return uint64(st.Nlink), err
}

func stat(f *os.File) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st, err
}

func versionOf(st unix.Stat_t) version {
	return version{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// of returns the SHA-256 of a file in hexadecimal. It fails if the file is
// larger than limit, in bytes, or changes while it is read.
func (s *sums) of(ctx context.Context, f *os.File, limit int64) (string, error) {
	st, err := stat(f)
	if err != nil {
		return "", err
	}
	if st.Size > limit {
		return "", fmt.Errorf("it is %d bytes large, and max_size of the unix attestor is %d", st.Size, limit)
	}
	v := versionOf(st)
	if sum, ok := s.get(v); ok {
		return sum, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, &bounded{ctx, io.LimitReader(f, limit+1)}); err != nil {
		return "", err
	}
	after, err := stat(f)
	if err != nil {
		return "", err
	}
	// Making or removing a name changes ctime, and nothing of the content.
	if w := versionOf(after); w.size != v.size || w.mtime != v.mtime {
		return "", errors.New("it changed while it was read")
	}
	sum := hex.EncodeToString(h.Sum(nil))
	if time.Since(time.Unix(v.ctime.Unix())) > settled {
		s.put(v, sum)
	}
	return sum, nil
}

func (s *sums) get(v version) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.known[v]
	if !ok {
		return "", false
	}
	s.order.MoveToFront(e)
	return e.Value.(*remembered).sum, true
}

func (s *sums) put(v version, sum string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = make(map[version]*list.Element)
	}
	if _, ok := s.known[v]; ok {
		return
	}
	s.known[v] = s.order.PushFront(&remembered{v, sum})
	if s.order.Len() > maxSums {
		oldest := s.order.Back()
		delete(s.known, s.order.Remove(oldest).(*remembered).version)
	}
}

// bounded stops reading when its context ends.
type bounded struct {
	ctx context.Context
	r   io.Reader
}

func (b *bounded) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	return b.r.Read(p)
}
