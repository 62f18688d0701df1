// Package journal knows what this server has issued that has not ended: which
// serial number was whose, and through which agent. Without it nothing could be
// revoked but by its serial number.
//
// A [Journal] keeps each SVID in memory, for who looks ([Journal.Find]), and in
// files, from which the next start reads it. [Journal.Add] has written an SVID
// to its file before it returns, so that a server that crashes forgets nothing:
// the file is mapped into memory, which is the kernel's and costs no call of
// it. Files are synced to the disk every [SyncInterval], all that
// has come meanwhile at once, so that a machine that loses its power forgets
// what was issued in about so long. What is forgotten can still be revoked by
// its serial number, and ends by itself.
//
// SVIDs are kept in segments, each a file and its records in memory. A segment
// goes when all in it have ended; of one in which few have not, those are
// written anew and it goes too. So files have about four times the size of what
// has not ended, at most.
package journal

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// SyncInterval is how often what was written is synced to the disk.
	SyncInterval = time.Second
	// MaxSVIDs is how many SVIDs are kept. The oldest segment is forgotten for
	// more: what was in it can be revoked by its serial number only.
	MaxSVIDs = 4 << 20

	maxSegment    = 32 << 10    // records
	segmentSize   = 4 << 20     // bytes of a segment's file, all of which are taken when it is made
	maxRecord     = 8 << 10     // bytes: three texts of at most 2 KiB
	maxText       = 2 << 10     // bytes: a SPIFFE ID
	sparse        = 4           // a segment of which less than 1 in so many is left is written anew
	pruneInterval = time.Minute // and of trying to make a file again
	suffix        = ".log"
	// version begins each file.
	version = "hallmark-journal-1\n"
)

// SVID is what is kept of an X509-SVID or another certificate, or of a token with
// a status, that was issued.
type SVID struct {
	Serial    [20]byte // big endian; of a token: package statuslist
	ID        string   // SPIFFE ID
	Node      string   // SPIFFE ID of the agent that asked for it; empty: none did
	Authority string   // ID of the authority that signed it
	IssuedAt  int64    // Unix seconds
	ExpiresAt int64    // Unix seconds
}

// SerialNumber returns the serial number without leading zeros.
func (s *SVID) SerialNumber() []byte { return bytes.TrimLeft(s.Serial[:], "\x00") }

// Journal keeps what was issued. It is safe for concurrent use.
type Journal struct {
	dir string // empty: in memory only
	now func() time.Time
	log *slog.Logger

	mu       sync.Mutex
	segments []*segment // the oldest first; the last is written to
	next     int        // number of the next segment
	live     int        // records in memory
	forgot   bool       // that MaxSVIDs was reached is logged
	failed   bool       // writing fails, which is logged
	dirty    bool       // written and not synced
	buffer   []byte
}

// segment is records of about one time.
type segment struct {
	path    string
	file    *os.File // nil: it is not written to any more
	mapped  []byte   // the file
	size    int      // bytes in use
	written int      // records in the file
	without int64    // Unix seconds until which it goes without a file, as none could be made
	records []SVID   // that have not ended, as of the last look
}

// Open reads what an earlier run has left in a directory, which it makes. An
// empty name keeps everything in memory. Now and log may be nil.
func Open(dir string, now func() time.Time, log *slog.Logger) (*Journal, error) {
	j := &Journal{dir: dir, now: now, log: log}
	if j.now == nil {
		j.now = time.Now
	}
	if j.log == nil {
		j.log = slog.New(slog.DiscardHandler)
	}
	if dir == "" {
		return j, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open the journal of issued SVIDs: %w", err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return nil, err
	}
	slices.Sort(names) // numbers have a fixed width
	texts := make(map[string]string)
	for _, name := range names {
		number, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(name), suffix))
		if err != nil {
			continue // none of ours
		}
		s, err := j.read(name, texts)
		if err != nil {
			return nil, fmt.Errorf("read the journal of issued SVIDs: %w", err)
		}
		j.next = max(j.next, number+1)
		j.segments = append(j.segments, s)
		j.live += len(s.records)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.prune()
	return j, nil
}

// read reads a segment's file to its end, or to where it is torn: there the
// machine lost its power.
func (j *Journal) read(name string, texts map[string]string) (*segment, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := &segment{path: name}
	now := j.now().Unix()
	r := bufio.NewReaderSize(f, 64<<10)
	head := make([]byte, len(version))
	if _, err := io.ReadFull(r, head); err != nil {
		return s, nil // it was just made
	}
	if string(head) != version {
		return nil, fmt.Errorf("%s was written by another version; move it away, and revoke what it has by serial number", name)
	}
	for {
		payload, err := next(r)
		if err == io.EOF {
			return s, nil
		}
		var v SVID
		if err == nil {
			v, err = decode(payload, texts)
		}
		if err != nil {
			j.log.Warn("the journal of issued SVIDs is torn; what follows can be revoked by serial number only", "file", name, "after", s.written, "error", err)
			return s, nil
		}
		s.written++
		if v.ExpiresAt > now {
			s.records = append(s.records, v)
		}
	}
}

var errTorn = errors.New("a record is not whole")

// next reads a record: its length, a checksum, and the payload.
func next(r io.Reader) ([]byte, error) {
	var head [6]byte
	switch n, err := io.ReadFull(r, head[:]); {
	case err == io.EOF && n == 0:
		return nil, io.EOF
	case err != nil:
		return nil, errTorn
	}
	size := binary.LittleEndian.Uint16(head[:])
	if head == ([6]byte{}) {
		return nil, io.EOF // what was not used of the file
	}
	if size > maxRecord {
		return nil, errTorn
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		return nil, errTorn
	}
	if crc32.ChecksumIEEE(payload) != binary.LittleEndian.Uint32(head[2:]) {
		return nil, errTorn
	}
	return payload, nil
}

// encode appends a record.
func encode(b []byte, v *SVID) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0)
	b = append(b, v.Serial[:]...)
	b = binary.AppendVarint(b, v.IssuedAt)
	b = binary.AppendVarint(b, v.ExpiresAt)
	for _, text := range []string{v.ID, v.Node, v.Authority} {
		b = binary.AppendUvarint(b, uint64(len(text)))
		b = append(b, text...)
	}
	payload := b[start+6:]
	binary.LittleEndian.PutUint16(b[start:], uint16(len(payload)))
	binary.LittleEndian.PutUint32(b[start+2:], crc32.ChecksumIEEE(payload))
	return b
}

// decode reads a record's payload. Texts are shared by all records that have
// them.
func decode(p []byte, texts map[string]string) (v SVID, err error) {
	if len(p) < len(v.Serial) {
		return v, errTorn
	}
	p = p[copy(v.Serial[:], p):]
	for _, to := range []*int64{&v.IssuedAt, &v.ExpiresAt} {
		x, n := binary.Varint(p)
		if n <= 0 {
			return v, errTorn
		}
		*to, p = x, p[n:]
	}
	for _, to := range []*string{&v.ID, &v.Node, &v.Authority} {
		size, n := binary.Uvarint(p)
		if n <= 0 || size > maxText || uint64(len(p)-n) < size {
			return v, errTorn
		}
		text := p[n : n+int(size)]
		p = p[n+int(size):]
		known, ok := texts[string(text)]
		if !ok {
			known = string(text)
			texts[known] = known
		}
		*to = known
	}
	if len(p) > 0 {
		return v, errTorn
	}
	return v, nil
}

// Add keeps an SVID that is about to go out. If it cannot be written to a file,
// that is logged, and it is kept in memory: issuing goes on.
func (j *Journal) Add(v SVID) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.add(&v)
}

func (j *Journal) add(v *SVID) {
	j.buffer = encode(j.buffer[:0], v)
	s := j.current(len(j.buffer))
	s.records = append(s.records, *v)
	s.written++
	j.live++
	if s.file == nil {
		return
	}
	// What follows the length comes first: a record is there whole or not at all.
	copy(s.mapped[s.size+2:], j.buffer[2:])
	copy(s.mapped[s.size:], j.buffer[:2])
	s.size += len(j.buffer)
	j.dirty = true
}

// current returns the segment that is written to, with room for a record.
func (j *Journal) current(size int) *segment {
	if n := len(j.segments); n > 0 {
		last := j.segments[n-1]
		if last.written < maxSegment && (j.dir == "" || last.file != nil && last.size+size <= len(last.mapped) || last.without > j.now().Unix()) {
			return last
		}
		j.seal(j.segments[n-1])
	}
	for j.live >= MaxSVIDs && len(j.segments) > 1 {
		if !j.forgot {
			j.forgot = true
			j.log.Error("there are more SVIDs that have not ended than the journal keeps; the oldest can be revoked by serial number only", "most", MaxSVIDs)
		}
		j.drop(0)
	}
	s := &segment{records: make([]SVID, 0, 64)}
	if j.dir != "" {
		s.path = filepath.Join(j.dir, fmt.Sprintf("%010d%s", j.next, suffix))
		j.next++
		err := s.create()
		if j.report(err); err != nil {
			s.without = j.now().Add(pruneInterval).Unix()
		}
	}
	j.segments = append(j.segments, s)
	return s
}

// create makes the segment's file. All of its blocks are taken at once: a full
// disk is found out here, not when memory is written.
func (s *segment) create() (err error) {
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(s.path))
		}
	}()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, segmentSize); err != nil {
		return fmt.Errorf("%s: take %d bytes: %w", s.path, segmentSize, err)
	}
	if s.mapped, err = unix.Mmap(int(f.Fd()), 0, segmentSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("%s: map it: %w", s.path, err)
	}
	s.size = copy(s.mapped, version)
	s.file = f
	return nil
}

// close gives back what the file has not used.
func (s *segment) close() error {
	err := errors.Join(unix.Munmap(s.mapped), s.file.Truncate(int64(s.size)), s.file.Sync(), s.file.Close())
	s.file, s.mapped = nil, nil
	return err
}

// report logs that writing fails, once, and that it works again.
func (j *Journal) report(err error) {
	switch {
	case err != nil && !j.failed:
		j.log.Error("what is issued cannot be written to the journal; after a restart it can be revoked by serial number only", "error", err)
	case err == nil && j.failed:
		j.log.Info("the journal of issued SVIDs can be written again")
	}
	j.failed = err != nil
}

// seal syncs and closes a segment's file.
func (j *Journal) seal(s *segment) {
	if s.file != nil {
		j.report(s.close())
	}
}

// drop forgets a segment.
func (j *Journal) drop(i int) {
	s := j.segments[i]
	j.seal(s)
	if s.path != "" {
		if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			j.report(err)
		}
	}
	j.live -= len(s.records)
	j.segments = slices.Delete(j.segments, i, i+1)
}

// prune forgets what has ended.
func (j *Journal) prune() {
	now := j.now().Unix()
	for i := 0; i < len(j.segments); i++ {
		s := j.segments[i]
		left := slices.DeleteFunc(s.records, func(v SVID) bool { return v.ExpiresAt <= now })
		j.live -= len(s.records) - len(left)
		s.records = left
		last := i == len(j.segments)-1 && (s.file != nil || j.dir == "")
		switch {
		case last:
		case len(left) == 0:
			j.drop(i)
			i--
		case len(left) <= s.written/sparse:
			kept := slices.Clone(left)
			for k := range kept {
				j.add(&kept[k])
			}
			if last := j.segments[len(j.segments)-1]; last.file != nil {
				j.report(last.file.Sync()) // before the other is gone
			}
			j.drop(i)
			i--
		case cap(left) > 2*len(left):
			s.records = slices.Clone(left)
		}
	}
}

// Find returns the SVIDs that have not ended and for which a function returns
// true, in the order in which they were issued, about. The function must not
// call the journal.
func (j *Journal) Find(is func(*SVID) bool) []SVID {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.now().Unix()
	var found []SVID
	for _, s := range j.segments {
		for i := range s.records {
			if v := &s.records[i]; v.ExpiresAt > now && is(v) {
				found = append(found, *v)
			}
		}
	}
	return found
}

// Live returns how many SVIDs are kept, among which some may have ended within a
// minute.
func (j *Journal) Live() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.live
}

// Run syncs files and forgets what has ended, until the context ends. It returns
// the context's error.
func (j *Journal) Run(ctx context.Context) error {
	sync, prune := time.NewTicker(SyncInterval), time.NewTicker(pruneInterval)
	defer sync.Stop()
	defer prune.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sync.C:
			j.sync()
		case <-prune.C:
			j.mu.Lock()
			j.prune()
			j.mu.Unlock()
		}
	}
}

// sync syncs the file that is written to, without keeping issuing waiting.
func (j *Journal) sync() {
	j.mu.Lock()
	var f *os.File
	if n := len(j.segments); n > 0 && j.dirty {
		f, j.dirty = j.segments[n-1].file, false
	}
	j.mu.Unlock()
	if f == nil {
		return
	}
	if err := f.Sync(); err != nil && !errors.Is(err, os.ErrClosed) { // closed: it was synced
		j.mu.Lock()
		j.report(err)
		j.mu.Unlock()
	}
}

// Close syncs and closes the files. Nothing may be added after it.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.segments {
		j.seal(s)
	}
	if j.failed {
		return errors.New("the journal of issued SVIDs could not be written whole")
	}
	return nil
}
