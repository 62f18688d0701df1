package harness

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	protorekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"google.golang.org/protobuf/encoding/protojson"
)

// CosignPredicate is the type of the statement by which cosign signs an image.
const CosignPredicate = "https://sigstore.dev/cosign/sign/v1"

// SigstoreBundle is the type of a bundle in a registry.
const SigstoreBundle = "application/vnd.dev.sigstore.bundle.v0.3+json"

// Sigstore is an authority, a transparency log and a registry of images on
// loopback, of the makers of those: what signs is theirs, with keys of the test.
type Sigstore struct {
	Registry        string // host:port
	TrustedRootPath string // of a trusted root that has the authority and the log
	CTLogsPath      string // of one that has a log of certificates too

	signs *ca.VirtualSigstore
}

// NewSigstore starts one.
func NewSigstore(t testing.TB) *Sigstore {
	t.Helper()
	signs, err := ca.NewVirtualSigstore()
	must(t, err)
	server := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	dir := shortDir(t)
	must(t, os.Chmod(dir, 0o755)) // for agents that are not this user's
	s := &Sigstore{
		Registry: strings.TrimPrefix(server.URL, "http://"), signs: signs,
		TrustedRootPath: filepath.Join(dir, "trusted_root.json"), CTLogsPath: filepath.Join(dir, "ctlogs.json"),
	}
	for path, logs := range map[string]map[string]*root.TransparencyLog{s.TrustedRootPath: nil, s.CTLogsPath: signs.CTLogs()} {
		trusted, err := root.NewTrustedRoot(root.TrustedRootMediaType01, signs.FulcioCertificateAuthorities(), withIDs(t, logs),
			signs.TimestampingAuthorities(), withIDs(t, signs.RekorLogs()))
		must(t, err)
		data, err := trusted.MarshalJSON()
		must(t, err)
		must(t, os.WriteFile(path, data, 0o644))
	}
	return s
}

// withIDs gives logs their IDs as a file has them, which are no text.
func withIDs(t testing.TB, logs map[string]*root.TransparencyLog) map[string]*root.TransparencyLog {
	t.Helper()
	for id, l := range logs {
		var err error
		l.ID, err = hex.DecodeString(id)
		must(t, err)
	}
	return logs
}

// Image pushes an image, and returns its name by digest.
func (s *Sigstore) Image(t testing.TB, repository string) string {
	t.Helper()
	image, err := random.Image(100, 1)
	must(t, err)
	return s.push(t, repository, image)
}

// Program pushes an image of one static program, as [Containers.Import] makes
// one. In another repository it is another image.
func (s *Sigstore) Program(t testing.TB, repository, program string) string {
	t.Helper()
	content := layerOf(t, program)
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithCompressionLevel(gzip.BestSpeed))
	must(t, err)
	image, err := mutate.AppendLayers(empty.Image, layer)
	must(t, err)
	image, err = mutate.Config(image, v1.Config{Entrypoint: []string{"/app"}, Labels: map[string]string{"repository": repository}})
	must(t, err)
	return s.push(t, repository, image)
}

func (s *Sigstore) push(t testing.TB, repository string, image v1.Image) string {
	t.Helper()
	ref, err := name.NewRepository(s.Registry + "/" + repository)
	must(t, err)
	must(t, remote.Write(ref.Tag("latest"), image))
	digest, err := image.Digest()
	must(t, err)
	return ref.Digest(digest.String()).String()
}

// SigstoreLayer is a signature as a layer of a tag: what is signed, and
// annotations.
type SigstoreLayer struct {
	Content     []byte
	Annotations map[string]string
}

// SigstorePayload is what a layer's signature is over.
func SigstorePayload(digest string) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":"example.com/any"},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, digest)
}

// Layer signs a payload as somebody.
func (s *Sigstore) Layer(t testing.TB, payload []byte, issuer, subject string) SigstoreLayer {
	t.Helper()
	entity, err := s.signs.Sign(subject, issuer, payload)
	must(t, err)
	return SigstoreLayer{payload, s.annotations(t, entity)}
}

func (s *Sigstore) annotations(t testing.TB, entity *ca.TestEntity) map[string]string {
	t.Helper()
	content, err := entity.SignatureContent()
	must(t, err)
	entry := s.logEntry(t, entity)
	var logged struct {
		SignedEntryTimestamp []byte
		Payload              struct {
			Body           []byte `json:"body"`
			IntegratedTime int64  `json:"integratedTime"`
			LogIndex       int64  `json:"logIndex"`
			LogID          string `json:"logID"`
		}
	}
	logged.SignedEntryTimestamp = entry.InclusionPromise.SignedEntryTimestamp
	logged.Payload.Body, logged.Payload.IntegratedTime, logged.Payload.LogIndex = entry.CanonicalizedBody, entry.IntegratedTime, entry.LogIndex
	logged.Payload.LogID = hex.EncodeToString(entry.LogId.KeyId)
	text, err := json.Marshal(logged)
	must(t, err)
	return map[string]string{
		"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(content.Signature()),
		"dev.sigstore.cosign/certificate":    string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leafOf(t, entity)})),
		"dev.sigstore.cosign/bundle":         string(text),
	}
}

func leafOf(t testing.TB, entity verify.SignedEntity) []byte {
	t.Helper()
	v, err := entity.VerificationContent()
	must(t, err)
	return v.Certificate().Raw
}

// logEntry returns the log's entry whole: with its kind, and with the log's
// promise, which is made anew.
func (s *Sigstore) logEntry(t testing.TB, entity verify.SignedEntity) *protorekor.TransparencyLogEntry {
	t.Helper()
	entries, err := entity.TlogEntries()
	must(t, err)
	e := entries[0].TransparencyLogEntry()
	var kind struct{ Kind, APIVersion string }
	must(t, json.Unmarshal(e.CanonicalizedBody, &kind))
	e.KindVersion = &protorekor.KindVersion{Kind: kind.Kind, Version: kind.APIVersion}
	promise, err := s.signs.RekorSignPayload(tlog.RekorPayload{
		Body: base64.StdEncoding.EncodeToString(e.CanonicalizedBody), IntegratedTime: e.IntegratedTime,
		LogIndex: e.LogIndex, LogID: hex.EncodeToString(e.LogId.KeyId),
	})
	must(t, err)
	e.InclusionPromise = &protorekor.InclusionPromise{SignedEntryTimestamp: promise}
	return e
}

// PutLayers puts signatures beside an image, as layers of a tag.
func (s *Sigstore) PutLayers(t testing.TB, image string, layers ...SigstoreLayer) {
	t.Helper()
	digest, err := name.NewDigest(image)
	must(t, err)
	signed := empty.Image
	for _, l := range layers {
		signed, err = mutate.Append(signed, mutate.Addendum{
			Layer: static.NewLayer(l.Content, "application/vnd.dev.cosign.simplesigning.v1+json"), Annotations: l.Annotations,
		})
		must(t, err)
	}
	must(t, remote.Write(digest.Context().Tag(strings.Replace(digest.DigestStr(), ":", "-", 1)+".sig"), signed))
}

// SigstoreStatement is what a bundle says of an image.
func SigstoreStatement(image, predicateType string) []byte {
	_, digest, _ := strings.Cut(image, "@sha256:")
	return fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"","digest":{"sha256":%q}}],"predicateType":%q,"predicate":{}}`, digest, predicateType)
}

// Bundle signs a statement as somebody.
func (s *Sigstore) Bundle(t testing.TB, statement []byte, issuer, subject string) *protobundle.Bundle {
	t.Helper()
	entity, err := s.signs.AttestAtTime(subject, issuer, statement, time.Now().Add(5*time.Minute), true)
	must(t, err)
	content, err := entity.SignatureContent()
	must(t, err)
	return &protobundle.Bundle{
		MediaType: SigstoreBundle,
		Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &protodsse.Envelope{
			Payload: statement, PayloadType: "application/vnd.in-toto+json", Signatures: []*protodsse.Signature{{Sig: content.Signature()}},
		}},
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content:     &protobundle.VerificationMaterial_Certificate{Certificate: &protocommon.X509Certificate{RawBytes: leafOf(t, entity)}},
			TlogEntries: []*protorekor.TransparencyLogEntry{s.logEntry(t, entity)},
		},
	}
}

// PutBundle puts a bundle beside an image, which it refers to.
func (s *Sigstore) PutBundle(t testing.TB, image string, b *protobundle.Bundle) {
	t.Helper()
	content, err := protojson.Marshal(b)
	must(t, err)
	s.PutBundleText(t, image, content)
}

// PutBundleText does so with anything.
func (s *Sigstore) PutBundleText(t testing.TB, image string, content []byte) {
	t.Helper()
	digest, err := name.NewDigest(image)
	must(t, err)
	subject, err := remote.Head(digest)
	must(t, err)
	made, err := mutate.Append(mutate.MediaType(mutate.ConfigMediaType(empty.Image, SigstoreBundle), types.OCIManifestSchema1), mutate.Addendum{
		Layer: static.NewLayer(content, SigstoreBundle),
	})
	must(t, err)
	referring := mutate.Subject(made, *subject).(v1.Image)
	sum, err := referring.Digest()
	must(t, err)
	must(t, remote.Write(digest.Context().Digest(sum.String()), referring))
}
