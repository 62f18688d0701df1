package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
)

// A backup is, with all numbers big endian:
//
//	"hallmark backup\n"                    16 bytes
//	format                                 4 bytes: 1
//	for each record, in the order of keys:
//	  length of what follows               4 bytes, from 2
//	  length of the key                    2 bytes
//	  key, value
//	zero                                   4 bytes
//	number of records                      8 bytes
//	revision                               8 bytes
//	SHA-256 of everything before it       32 bytes
//
// Nothing follows. Revisions of single records are not in it: a restored
// record has a new one.
const (
	backupMagic  = "hallmark backup\n"
	backupFormat = 1
	maxFrame     = 2 + MaxKey + MaxValue
)

// restoringKey is a record that exists while a store is being restored into.
// The registry has no such key.
const restoringKey = "restoring"

var restoringMark = Write{Key: restoringKey, Value: []byte{}}

// revisionJump is how far above the backup's revision a restored store begins.
// The store that the backup was made of may have gone on, and an agent may have
// seen any of its later revisions: with the jump, none of them is one that the
// restored store will have, and the agent is sent everything. It would take
// 10,000 writes a second for five days to cross it.
const revisionJump = 1 << 32

// Backup writes all records of the store, as of one revision, and returns that
// revision. The store stays in use meanwhile. A writer that fails, or is slow,
// does it no harm; a slow one keeps versions on disk for as long as it takes.
func Backup(ctx context.Context, s Store, w io.Writer) (Revision, error) {
	out := bufio.NewWriterSize(w, 64<<10)
	sum := sha256.New()
	b := io.MultiWriter(out, sum) // an error of out comes again from Flush
	b.Write(binary.BigEndian.AppendUint32([]byte(backupMagic), backupFormat))
	count := uint64(0)
	var head []byte
	revision, err := s.Read(ctx, "", func(r Record) error {
		if r.Key == restoringKey {
			return errIncomplete
		}
		if len(r.Key) > MaxKey || len(r.Value) > MaxValue {
			return fmt.Errorf("record %.40q is over the bounds: key %d bytes, value %d", r.Key, len(r.Key), len(r.Value))
		}
		head = binary.BigEndian.AppendUint32(head[:0], uint32(2+len(r.Key)+len(r.Value)))
		head = binary.BigEndian.AppendUint16(head, uint16(len(r.Key)))
		head = append(head, r.Key...)
		b.Write(head)
		count++
		_, err := b.Write(r.Value)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("back up the store: %w", err)
	}
	tail := binary.BigEndian.AppendUint32(nil, 0)
	tail = binary.BigEndian.AppendUint64(tail, count)
	tail = binary.BigEndian.AppendUint64(tail, uint64(revision))
	b.Write(tail)
	out.Write(sum.Sum(nil))
	if err := out.Flush(); err != nil {
		return 0, fmt.Errorf("back up the store: %w", err)
	}
	return revision, nil
}

var errIncomplete = errors.New("a restore into it was interrupted, so that records are missing; delete the store and restore the backup again")

// CheckRestored returns an error if a restore into the store was interrupted,
// so that it has some of the records only. Programs call it before they use a
// store.
func CheckRestored(ctx context.Context, s Store) error {
	_, err := s.Read(ctx, restoringKey, func(r Record) error {
		if r.Key == restoringKey {
			return errIncomplete
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("check the store: %w", err)
	}
	return nil
}

// Edit gives a record another value on its way from a backup into a store.
type Edit func(key string, value []byte) ([]byte, error)

// Restore writes the records of a backup, with edits, into an empty store that
// nobody else writes to, and returns their number. It reads and verifies the whole backup
// before it writes anything; if r cannot seek, it keeps a copy in a temporary
// file. Afterwards the store's revision is above the backup's. If Restore is
// interrupted while it writes, [CheckRestored] says so.
func Restore(ctx context.Context, s Store, r io.Reader, edits ...Edit) (n int, err error) {
	if err := CheckRestored(ctx, s); err != nil {
		return 0, err
	}
	_, err = s.Read(ctx, "", func(Record) error {
		return errors.New("it has records already; a backup can only be restored into an empty store")
	})
	if err != nil {
		return 0, fmt.Errorf("restore into the store: %w", err)
	}
	again, start := seekable(r)
	if again == nil {
		spool, err := newSpool()
		if err != nil {
			return 0, fmt.Errorf("keep a copy of the backup: %w", err)
		}
		defer spool.Close()
		again, r = spool, io.TeeReader(r, spool)
	}
	revision, err := verify(ctx, r)
	if err != nil {
		return 0, fmt.Errorf("verify the backup: %w", err)
	}
	if _, err := again.Seek(start, io.SeekStart); err != nil {
		return 0, fmt.Errorf("read the backup again: %w", err)
	}
	if err := s.Advance(ctx, revision+revisionJump); err != nil {
		return 0, fmt.Errorf("restore into the store: %w", err)
	}
	begun := s.Commit(ctx, Txn{If: []Condition{{Key: restoringKey}}, Do: []Write{restoringMark}})[0]
	if begun.Err != nil {
		return 0, fmt.Errorf("restore into the store: %w", begun.Err)
	}
	n, err = write(ctx, s, newBackupReader(again), begun.Revision, edits)
	if err != nil {
		return 0, fmt.Errorf("restore into the store, which is incomplete now; delete it and restore again: %w", err)
	}
	return n, nil
}

// verify reads a backup to its end and returns its revision.
func verify(ctx context.Context, r io.Reader) (Revision, error) {
	b := newBackupReader(r)
	for {
		if _, _, err := b.next(); err == io.EOF {
			return b.revision, nil
		} else if err != nil {
			return 0, err
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
}

// newSpool returns a file that has no name and goes when it is closed.
func newSpool() (*os.File, error) {
	f, err := os.CreateTemp("", "hallmark-restore-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// seekable returns the reader and where it stands, if it can be read again.
// Pipes have a Seek that fails.
func seekable(r io.Reader) (io.ReadSeeker, int64) {
	if s, ok := r.(io.ReadSeeker); ok {
		if start, err := s.Seek(0, io.SeekCurrent); err == nil {
			return s, start
		}
	}
	return nil, 0
}

// write brings the records of a verified backup into an empty store that has
// the mark, as of a revision: each transaction on condition that the mark is
// still ours. Last it deletes the mark.
func write(ctx context.Context, s Store, b *backupReader, mark Revision, edits []Edit) (int, error) {
	ours := []Condition{{Key: restoringKey, Revision: mark}}
	const callBytes = 4 << 20 // records that share one Commit; bounds what is in memory
	var txns []Txn
	txn, txnBytes, total := Txn{If: ours}, len(restoringKey), 0
	commit := func() error {
		for _, r := range s.Commit(ctx, txns...) {
			if r.Err != nil {
				return r.Err
			}
		}
		txns, total = txns[:0], 0
		return nil
	}
	n := 0
	for {
		key, value, err := b.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("the backup has changed since it was verified: %w", err)
		}
		for _, edit := range edits {
			if value, err = edit(key, value); err != nil {
				return 0, fmt.Errorf("record %.40q: %w", key, err)
			}
		}
		if size := len(key) + len(value); 1+len(txn.Do) == MaxWrites || txnBytes+size > MaxBytes {
			txns = append(txns, txn)
			total += txnBytes
			txn, txnBytes = Txn{If: ours}, len(restoringKey)
			if total >= callBytes {
				if err := commit(); err != nil {
					return 0, err
				}
			}
		}
		txn.Do = append(txn.Do, Write{Key: key, Value: value})
		txnBytes += len(key) + len(value)
		n++
	}
	if len(txn.Do) > 0 {
		txns = append(txns, txn)
	}
	txns = append(txns, Txn{If: ours, Do: []Write{{Key: restoringKey}}})
	return n, commit()
}

// backupReader reads a backup and checks it on the way.
type backupReader struct {
	in       *bufio.Reader
	sum      hash.Hash
	started  bool
	count    uint64
	last     string
	revision Revision // of the backup, after the last record
	buf      []byte
}

func newBackupReader(r io.Reader) *backupReader {
	return &backupReader{in: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
}

var errTruncated = errors.New("it is truncated")

// read reads n bytes, at most maxFrame, valid until the next call.
func (b *backupReader) read(n int) ([]byte, error) {
	if n > cap(b.buf) {
		b.buf = make([]byte, 0, n)
	}
	buf := b.buf[:n]
	if _, err := io.ReadFull(b.in, buf); err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, errTruncated
	} else if err != nil {
		return nil, err
	}
	b.sum.Write(buf)
	return buf, nil
}

// next returns the next record, whose value is the caller's to keep, or io.EOF
// after the last one, when all of the backup has been found right.
func (b *backupReader) next() (key string, value []byte, err error) {
	if !b.started {
		if err := b.begin(); err != nil {
			return "", nil, err
		}
		b.started = true
	}
	head, err := b.read(4)
	if err != nil {
		return "", nil, err
	}
	length := binary.BigEndian.Uint32(head)
	if length == 0 {
		return "", nil, b.end()
	}
	if length < 2 || length > maxFrame {
		return "", nil, fmt.Errorf("it is damaged: record %d has a length of %d bytes; the most is %d", b.count+1, length, maxFrame)
	}
	frame, err := b.read(int(length))
	if err != nil {
		return "", nil, err
	}
	keyLength := int(binary.BigEndian.Uint16(frame))
	frame = frame[2:]
	if keyLength > MaxKey || keyLength > len(frame) || len(frame)-keyLength > MaxValue {
		return "", nil, fmt.Errorf("it is damaged: record %d has a key of %d bytes in %d", b.count+1, keyLength, len(frame))
	}
	key, value = string(frame[:keyLength]), append([]byte{}, frame[keyLength:]...)
	if b.count > 0 && key <= b.last {
		return "", nil, fmt.Errorf("it is damaged: record %d is out of order", b.count+1)
	}
	if key == restoringKey {
		return "", nil, errors.New("it was made of a store that was being restored into")
	}
	b.last = key
	b.count++
	return key, value, nil
}

func (b *backupReader) begin() error {
	magic, err := b.read(len(backupMagic))
	if err == errTruncated || err == nil && string(magic) != backupMagic {
		return errors.New("it is not a backup that hallmark made")
	}
	if err != nil {
		return err
	}
	format, err := b.read(4)
	if err != nil {
		return err
	}
	if f := binary.BigEndian.Uint32(format); f != backupFormat {
		return fmt.Errorf("its format is %d, and this version of hallmark reads format %d", f, backupFormat)
	}
	return nil
}

// end checks what comes after the last record.
func (b *backupReader) end() error {
	tail, err := b.read(16)
	if err != nil {
		return err
	}
	count, revision := binary.BigEndian.Uint64(tail), binary.BigEndian.Uint64(tail[8:])
	want := b.sum.Sum(nil)
	sum, err := b.read(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(sum, want) {
		return errors.New("it is damaged or was tampered with: its checksum does not match")
	}
	if count != b.count {
		return fmt.Errorf("it is damaged: it says that it has %d records, and has %d", count, b.count)
	}
	if revision > math.MaxInt64-2*revisionJump {
		return fmt.Errorf("it is damaged: it has revision %d", revision)
	}
	if _, err := b.in.ReadByte(); err == nil {
		return errors.New("it is damaged: something follows its end")
	} else if err != io.EOF {
		return err
	}
	b.revision = Revision(revision)
	return io.EOF
}
