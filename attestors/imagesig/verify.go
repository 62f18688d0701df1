package imagesig

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protorekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
)

// cosignPredicate is the type of the statement by which cosign signs an image;
// statements of other types attest something else of it.
const cosignPredicate = "https://sigstore.dev/cosign/sign/v1"

// found is a signature as a registry has it, in the form that is verified.
type found struct {
	bundle *bundle.Bundle
	// artifact is what is signed: the payload of an older signature. Nil: the
	// image's digest itself.
	artifact []byte
	digest   []byte // SHA-256 of the image's manifest
}

// policy says what must be signed.
func (f *found) policy(options ...verify.PolicyOption) verify.PolicyBuilder {
	if f.artifact != nil {
		return verify.NewPolicy(verify.WithArtifact(bytes.NewReader(f.artifact)), options...)
	}
	return verify.NewPolicy(verify.WithArtifactDigest("sha256", f.digest), options...)
}

// verify returns what a signature says if it counts.
func (t *trust) verify(f *found) ([]string, error) {
	content, err := f.bundle.VerificationContent()
	if err != nil {
		return nil, err
	}
	if content.Certificate() == nil {
		return t.byKey(f)
	}
	if t.identities == nil {
		return nil, errors.New("it is by a certificate, and no identities are configured")
	}
	r, err := t.identities.Verify(f.bundle, f.policy(t.allow...))
	if err != nil {
		return nil, err
	}
	values := f.values(r)
	if r.Statement == nil || r.Statement.PredicateType == cosignPredicate {
		values = append(values,
			"image-signature-subject:"+r.Signature.Certificate.SubjectAlternativeName,
			"image-signature-issuer:"+r.Signature.Certificate.Issuer)
		values = append(values, f.log()...)
	}
	return values, nil
}

// byKey tries each of the configured keys.
func (t *trust) byKey(f *found) ([]string, error) {
	err := errors.New("it is by a key, and no keys are configured")
	for name, v := range t.keys {
		var r *verify.VerificationResult
		if r, err = v.Verify(f.bundle, f.policy(verify.WithKey())); err == nil {
			values := f.values(r)
			if r.Statement == nil || r.Statement.PredicateType == cosignPredicate {
				values = append(values, "image-signature-key:"+name)
			}
			return values, nil
		}
	}
	return nil, err
}

// values is what any verified signature says.
func (f *found) values(r *verify.VerificationResult) []string {
	if r.Statement != nil && r.Statement.PredicateType != cosignPredicate {
		return []string{"image-attestations:verified", "image-attestation-type:" + r.Statement.PredicateType}
	}
	values := []string{"image-signature:verified"}
	if content, err := f.bundle.SignatureContent(); err == nil {
		values = append(values, "image-signature-value:"+base64.StdEncoding.EncodeToString(content.Signature()))
	}
	return values
}

// log is what the transparency log says of a signature that was verified with
// it.
func (f *found) log() []string {
	var values []string
	for _, e := range f.bundle.VerificationMaterial.TlogEntries {
		values = append(values,
			"image-signature-log-id:"+hex.EncodeToString(e.LogId.GetKeyId()),
			fmt.Sprintf("image-signature-log-index:%d", e.LogIndex))
		if e.IntegratedTime > 0 { // newer logs leave the time to timestamp authorities
			values = append(values, fmt.Sprintf("image-signature-integrated-time:%d", e.IntegratedTime))
		}
		if p := e.InclusionPromise.GetSignedEntryTimestamp(); len(p) > 0 {
			values = append(values, "image-signature-signed-entry-timestamp:"+base64.StdEncoding.EncodeToString(p))
		}
	}
	return values
}

// Annotations of a signature that cosign has put beside an image as a layer of a
// tag (cosign's SIGNATURE_SPEC).
const (
	annotationSignature   = "dev.cosignproject.cosign/signature"
	annotationCertificate = "dev.sigstore.cosign/certificate"
	annotationBundle      = "dev.sigstore.cosign/bundle"
)

// payload is what a signature of that kind is over.
type payload struct {
	Critical struct {
		Image struct {
			Digest string `json:"docker-manifest-digest"`
		} `json:"image"`
		Type string `json:"type"`
	} `json:"critical"`
}

// payloadType is that of every signature that cosign makes.
const payloadType = "cosign container image signature"

// logged is what a log has answered when such a signature was put into it.
type logged struct {
	SignedEntryTimestamp []byte
	Payload              struct {
		Body           []byte `json:"body"`
		IntegratedTime int64  `json:"integratedTime"`
		LogIndex       int64  `json:"logIndex"`
		LogID          string `json:"logID"`
	}
}

// readLayer makes the form that is verified of a layer with a signature, whose
// content is what was signed: that it is about the image is checked here.
func readLayer(content []byte, annotations map[string]string, digest string) (*found, error) {
	var p payload
	if err := json.Unmarshal(content, &p); err != nil {
		return nil, fmt.Errorf("read what is signed: %w", err)
	}
	if p.Critical.Type != payloadType {
		return nil, fmt.Errorf("what is signed is a %q, not a %q", p.Critical.Type, payloadType)
	}
	if p.Critical.Image.Digest != digest {
		return nil, fmt.Errorf("what is signed is another image, %s", p.Critical.Image.Digest)
	}
	signature, err := base64.StdEncoding.DecodeString(annotations[annotationSignature])
	if err != nil || len(signature) == 0 {
		return nil, errors.New("there is no signature")
	}
	sum := sha256Of(content)
	b := &protobundle.Bundle{
		MediaType: "application/vnd.dev.sigstore.bundle+json;version=0.1",
		Content: &protobundle.Bundle_MessageSignature{MessageSignature: &protocommon.MessageSignature{
			MessageDigest: &protocommon.HashOutput{Algorithm: protocommon.HashAlgorithm_SHA2_256, Digest: sum},
			Signature:     signature,
		}},
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content: &protobundle.VerificationMaterial_PublicKey{PublicKey: &protocommon.PublicKeyIdentifier{}},
		},
	}
	if pem := annotations[annotationCertificate]; pem != "" {
		certs, err := cryptoutils.UnmarshalCertificatesFromPEM([]byte(pem))
		if err != nil || len(certs) == 0 {
			return nil, errors.New("its certificate cannot be read")
		}
		b.VerificationMaterial.Content = &protobundle.VerificationMaterial_X509CertificateChain{X509CertificateChain: &protocommon.X509CertificateChain{
			Certificates: []*protocommon.X509Certificate{{RawBytes: certs[0].Raw}}, // what it leads to is in the trusted root
		}}
	}
	if text := annotations[annotationBundle]; text != "" {
		entry, err := readLogged(text)
		if err != nil {
			return nil, err
		}
		b.VerificationMaterial.TlogEntries = []*protorekor.TransparencyLogEntry{entry}
	}
	made, err := bundle.NewBundle(b)
	if err != nil {
		return nil, err
	}
	return &found{bundle: made, artifact: content}, nil
}

func readLogged(text string) (*protorekor.TransparencyLogEntry, error) {
	var l logged
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return nil, fmt.Errorf("read what the log said: %w", err)
	}
	id, err := hex.DecodeString(l.Payload.LogID)
	if err != nil {
		return nil, fmt.Errorf("read the log's ID: %w", err)
	}
	var kind struct{ Kind, APIVersion string }
	if err := json.Unmarshal(l.Payload.Body, &kind); err != nil {
		return nil, fmt.Errorf("read the log's entry: %w", err)
	}
	return &protorekor.TransparencyLogEntry{
		LogIndex: l.Payload.LogIndex, LogId: &protocommon.LogId{KeyId: id},
		KindVersion:      &protorekor.KindVersion{Kind: kind.Kind, Version: kind.APIVersion},
		IntegratedTime:   l.Payload.IntegratedTime,
		InclusionPromise: &protorekor.InclusionPromise{SignedEntryTimestamp: l.SignedEntryTimestamp}, CanonicalizedBody: l.Payload.Body,
	}, nil
}

// readBundle makes the form that is verified of a bundle as newer versions of
// cosign, and others, put it beside an image.
func readBundle(content []byte, digest string) (*found, error) {
	var b bundle.Bundle
	if err := b.UnmarshalJSON(content); err != nil {
		return nil, fmt.Errorf("read the bundle: %w", err)
	}
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil {
		return nil, err
	}
	return &found{bundle: &b, digest: sum}, nil
}
