package tpm_test

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// quoted is a TPMS_ATTEST of a quote, as the library of another hand writes it.
func quoted(pcrs []uint, values ...[]byte) tpm2.TPMSAttest {
	digest := sha256.Sum256(bytes.Join(values, nil))
	return tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
		QualifiedSigner: tpm2.TPM2BName{Buffer: []byte("signer")}, ExtraData: tpm2.TPM2BData{Buffer: []byte("extra")},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: digest[:]},
		}),
	}
}

func certified(name string) tpm2.TPMSAttest {
	return tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify,
		QualifiedSigner: tpm2.TPM2BName{Buffer: []byte("signer")}, ExtraData: tpm2.TPM2BData{Buffer: []byte("extra")},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: []byte(name)}}),
	}
}

func TestWhatATPMHasSignedIsRead(t *testing.T) {
	got, err := tpm.ParseAttested(tpm2.Marshal(quoted([]uint{0, 7, 23}, []byte("a"), []byte("b"), []byte("c"))))
	if err != nil {
		t.Fatal(err)
	}
	if string(got.ExtraData) != "extra" || got.Certified != nil || !slices.Equal(got.Quoted.PCRs, []uint{0, 7, 23}) {
		t.Errorf("read %+v", got)
	}
	if !got.Quoted.Matches([][]byte{[]byte("a"), []byte("b"), []byte("c")}) || got.Quoted.Matches([][]byte{[]byte("a"), []byte("b")}) {
		t.Error("values that were not quoted match, or the others do not")
	}
	if got, err = tpm.ParseAttested(tpm2.Marshal(certified("name"))); err != nil || got.Quoted != nil || string(got.Certified.Name) != "name" {
		t.Errorf("read %+v: %v", got, err)
	}
}

func TestWhatIsCutOffOrGoesOnIsRefused(t *testing.T) {
	for _, a := range []tpm2.TPMSAttest{quoted([]uint{7}, []byte("a")), certified("name")} {
		whole := tpm2.Marshal(a)
		for n := range whole {
			if got, err := tpm.ParseAttested(whole[:n]); err == nil {
				t.Errorf("the first %d of %d bytes are read as %+v", n, len(whole), got)
			}
		}
		if _, err := tpm.ParseAttested(append(whole, 0)); err == nil {
			t.Error("a byte after the end is accepted")
		}
	}
}

func FuzzAttested(f *testing.F) {
	f.Add(tpm2.Marshal(quoted([]uint{0, 7}, []byte("a"))))
	f.Add(tpm2.Marshal(certified("name")))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := tpm.ParseAttested(data)
		if err != nil {
			return
		}
		if (got.Quoted == nil) == (got.Certified == nil) || len(got.ExtraData) > len(data) || !bytes.HasPrefix(data, []byte("\xffTCG")) {
			t.Errorf("%x is read as %+v", data, got)
		}
	})
}
